"""Objects in S3 and what speaks as S3 does: signed requests, ranges, conditions, multipart uploads."""
