# Bytes and text: what a ciphertext may come as, and when plaintext is text again.

use service.nu fail

const AGE = "age-encryption.org/v1"
const ARMOR = "-----BEGIN AGE ENCRYPTED FILE-----"

# The age file in bytes that are one, in armor around one, or in base64 of one.
export def age-bytes [at: record, --blame: string = "source"]: binary -> binary {
    let given = $in
    if ($given | bytes starts-with ($AGE | into binary)) {
        return $given
    }
    let text = $given | decode utf-8 | str trim
    let body = if ($text | str starts-with $ARMOR) { $text | lines | where $it !~ "^-----" | str join } else { $text }
    try {
        $body | str replace --all --regex '\s' "" | decode base64
    } catch {
        fail $at not_a_ciphertext "This is neither base64 nor an age file" --blame $blame
    }
}

# Text where the bytes are UTF-8 and stay the same as text, else the bytes.
export def text-or-bytes []: binary -> oneof<string, binary> {
    let bytes = $in
    let text = $bytes | decode utf-8 # replaces what is no UTF-8 and drops a byte order mark, without a word
    if ($text | into binary) == $bytes { $text } else { $bytes }
}
