# The header of an encrypted file, read without a key and not verified.

use service.nu fail

const HEADER_BYTES = 262144 # above it no header is read
const CHUNK_BYTES = 65536
const TAG_BYTES = 16
const NONCE_BYTES = 16
const NATIVE = [X25519 mlkem768x25519]

# Named values of the start of an age file, and of its size in all.
export def inspected [at: record, start: binary, size: int]: nothing -> record {
    let end = $start | bytes index-of ("\n--- " | into binary)
    let text = $start | bytes at 0..<$end | decode utf-8
    let rest = $start | bytes at ($end + 5).. | bytes index-of ("\n" | into binary)
    if not ($text | str starts-with "age-encryption.org/v1\n") or $end < 0 or $rest < 0 {
        fail $at not_a_ciphertext "This is not an age file, or its header is damaged"
    }
    let stanzas = $text | lines | where $it starts-with "-> " | each { str substring 3.. | split row " " }
    let bound = $stanzas | where $it.0 == "kms-service/context" | get --optional 0
    let header = $end + 5 + $rest + 1
    let payload = $size - $header
    {
        format: "age v1"
        made_by: (if $bound == null { "another age tool" } else { "kms-service" })
        key_id: ($bound | get --optional 2)
        key_version: ($bound | get --optional 3)
        backend: ($stanzas | each {|stanza| backend $stanza } | compact | uniq | sort | str join ", ")
        context: (if $bound == null { "none" } else { "bound" })
        origin: (if ($stanzas | any { $in.0 == "kms-service/origin" }) { "claimed" } else { "none" })
        stanzas: ($stanzas | each { first 4 | if $in.0 == "kms-service/wrap" { str join " " } else { first } })
        header_bytes: $header
        payload_bytes: $payload
        plaintext_bytes: (plain-bytes ($payload - $NONCE_BYTES))
    }
}

# The start of a file that `inspected` needs.
export def start [file: string]: nothing -> binary {
    open --raw $file | first $HEADER_BYTES
}

def backend [stanza: list<string>]: nothing -> oneof<string, nothing> {
    match $stanza.0 {
        "kms-service/wrap" => $stanza.1
        $type if $type in $NATIVE => "age"
        _ => null
    }
}

# Of a stream of chunks, each with a tag; null for a size that no whole file has.
def plain-bytes [stream: int]: nothing -> oneof<int, nothing> {
    let chunks = $stream / ($CHUNK_BYTES + $TAG_BYTES) | math ceil
    let plain = $stream - $chunks * $TAG_BYTES
    let last = $plain - ($chunks - 1) * $CHUNK_BYTES
    if $chunks < 1 or $last < 0 or ($last == 0 and $chunks > 1) { null } else { $plain }
}
