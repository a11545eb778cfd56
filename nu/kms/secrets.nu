# One secret at a time, through the pipeline.
#
# Commands take the pipeline by `into binary` in their first words: `$in` would cut the line end off what another
# program printed.

use complete.nu *
use context.nu
use service.nu [reach call fail]
use text.nu [age-bytes text-or-bytes]

const AT_ONCE_BYTES = 8388608 # above any setting of the single calls; a file goes another way

# Encrypt text or bytes; the ciphertext is text in base64.
#
# What another program printed is taken as it is, with the line end it may have.
@category kms
@search-terms seal
@example "text" { "secret-data" | kms encrypt }
@example "bound to a context" { "api-key" | kms encrypt --context "env=prod,service=api" }
@example "the bytes of a file" { open --raw logo.png | kms encrypt --context {env: prod} }
export def encrypt [
    --context: oneof<string, record> # encryption context, as "env=prod,service=api" or {env: prod, service: api}
    --key-id: string@nu-complete-keys # key to use instead of the default one
    --full # a record with key_id, key_version and backend too
    --url: string # address of the service, instead of $env.KMS_SERVICE_URL
    --token-file: path # file that holds the token, instead of $env.KMS_TOKEN_FILE
]: [string -> oneof<string, record>, binary -> oneof<string, record>] {
    into binary | first ($AT_ONCE_BYTES + 1) | sealed {
        url: $url
        token_file: $token_file
        context: $context
        key_id: $key_id
        full: $full
        arguments: {
            service: [$url (metadata $url).span]
            token-file: [$token_file (metadata $token_file).span]
            context: [$context (metadata $context).span]
            key-id: [$key_id (metadata $key_id).span]
        }
    }
}

def sealed [given: record]: binary -> oneof<string, record> {
    let plaintext = $in
    let at = reach $given.url $given.token_file $given.arguments --secret $plaintext
    at-once $plaintext $at
    let body = {plaintext: ($plaintext | encode base64), ...(asked $at $given)}
    let made = call $at POST /encrypt --body $body
    if $given.full { $made } else { $made.ciphertext }
}

# Decrypt base64, armor or an age file: to text where it is text, else to bytes.
@category kms
@search-terms open
@example "what kms encrypt made" { open --raw secret.b64 | kms decrypt --context "env=prod,service=api" }
@example "the bytes of a file" { open --raw secret.b64 | kms decrypt --raw | save --raw logo.png }
export def decrypt [
    --context: oneof<string, record> # the context it was encrypted with
    --key-id: string@nu-complete-keys # needed only for files that another age tool made
    --raw (-r) # bytes, also where they are text
    --full # a record with key_id, key_version, backend and origin too
    --url: string # address of the service, instead of $env.KMS_SERVICE_URL
    --token-file: path # file that holds the token, instead of $env.KMS_TOKEN_FILE
]: [string -> oneof<string, binary, record>, binary -> oneof<string, binary, record>] {
    into binary | first ($AT_ONCE_BYTES + 1) | opened {
        url: $url
        token_file: $token_file
        context: $context
        key_id: $key_id
        raw: $raw
        full: $full
        arguments: {
            service: [$url (metadata $url).span]
            token-file: [$token_file (metadata $token_file).span]
            context: [$context (metadata $context).span]
            key-id: [$key_id (metadata $key_id).span]
        }
    }
}

def opened [given: record]: binary -> oneof<string, binary, record> {
    let ciphertext = $in
    let at = reach $given.url $given.token_file $given.arguments
    at-once $ciphertext $at
    let body = {ciphertext: ($ciphertext | age-bytes $at | encode base64), ...(asked $at $given)}
    let made = call $at POST /decrypt --body $body
    let bytes = $made.plaintext | decode base64
    let plaintext = if $given.raw { $bytes } else { $bytes | text-or-bytes }
    if $given.full { $made | update plaintext $plaintext } else { $plaintext }
}

# Generate a random data key: a record with the key in base64, plain and encrypted.
@category kms
@search-terms "data key" envelope
@example "256 bits" { kms generate-key }
@example "128 bits" { kms generate-key --key-spec AES_128 }
export def generate-key [
    --key-spec: string@$SPECS = "AES_256" # AES_128 or AES_256
    --context: oneof<string, record> # encryption context of the encrypted key
    --key-id: string@nu-complete-keys # key to use instead of the default one
    --without-plaintext # give out the encrypted key only
    --url: string # address of the service, instead of $env.KMS_SERVICE_URL
    --token-file: path # file that holds the token, instead of $env.KMS_TOKEN_FILE
]: nothing -> record {
    let at = reach $url $token_file {
        service: [$url (metadata $url).span]
        token-file: [$token_file (metadata $token_file).span]
        context: [$context (metadata $context).span]
        key-id: [$key_id (metadata $key_id).span]
        key-spec: [$key_spec (metadata $key_spec).span]
    }
    if $key_spec not-in $SPECS {
        fail $at invalid_request $"A data key is ($SPECS | str join ' or ')" --blame key-spec
    }
    let context = context parsed $at $context
    let body = {key_spec: $key_spec, context: $context, key_id: $key_id, without_plaintext: $without_plaintext}
    call $at POST /generate-key --body $body
}

# Rewrap a ciphertext under the current version of its key, or under --key-id.
#
# The payload is not changed: anyone who could read the old ciphertext can read the new one.
@category kms
@search-terms rotate
@example "after a rotation" { open --raw secret.b64 | kms rewrap --context "env=prod" }
@example "for another key and context" {
    open --raw secret.b64 | kms rewrap --context {env: test} --new-context {env: prod} --key-id payroll
}
export def rewrap [
    --context: oneof<string, record> # the context it was encrypted with
    --new-context: oneof<string, record> # bind this instead; without it the old one stays
    --key-id: string@nu-complete-keys # key to wrap under
    --full # a record with key_id, key_version and backend too
    --url: string # address of the service, instead of $env.KMS_SERVICE_URL
    --token-file: path # file that holds the token, instead of $env.KMS_TOKEN_FILE
]: [string -> oneof<string, record>, binary -> oneof<string, record>] {
    into binary | first ($AT_ONCE_BYTES + 1) | wrapped {
        url: $url
        token_file: $token_file
        context: $context
        new_context: $new_context
        key_id: $key_id
        full: $full
        arguments: {
            service: [$url (metadata $url).span]
            token-file: [$token_file (metadata $token_file).span]
            context: [$context (metadata $context).span]
            new-context: [$new_context (metadata $new_context).span]
            key-id: [$key_id (metadata $key_id).span]
        }
    }
}

def wrapped [given: record]: binary -> oneof<string, record> {
    let ciphertext = $in
    let at = reach $given.url $given.token_file $given.arguments
    at-once $ciphertext $at
    let body = {
        ciphertext: ($ciphertext | age-bytes $at | encode base64)
        new_context: (context parsed $at $given.new_context --blame new-context)
        ...(asked $at $given)
    }
    let made = call $at POST /rewrap --body $body
    if $given.full { $made } else { $made.ciphertext }
}

def asked [at: record, given: record]: nothing -> record {
    {context: (context parsed $at $given.context), key_id: $given.key_id}
}

def at-once [given: binary, at: record]: nothing -> nothing {
    if ($given | bytes length) > $AT_ONCE_BYTES {
        fail $at too_large "What came through the pipeline is above 8 MiB"
    }
}
