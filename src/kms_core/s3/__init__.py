"""Objects in S3 and compatible stores: signed requests, ranges, conditions, multipart uploads."""
