# The state of the service, its keys, and the headers of encrypted files.

use complete.nu *
use inspection.nu [inspected start]
use service.nu [reach request call expect fail spots]
use text.nu age-bytes

const AT_ONCE_BYTES = 8388608 # what is not an age file as it stands is read whole up to here

# Show the state and the counters of the service.
@category kms
@example "how many jobs wait" { kms status | get queue_depth }
export def status [
    --url: string # address of the service, instead of $env.KMS_SERVICE_URL
    --token-file: path # file that holds the token, instead of $env.KMS_TOKEN_FILE
]: nothing -> record {
    call (reach $url $token_file {
        service: [$url (metadata $url).span]
        token-file: [$token_file (metadata $token_file).span]
    }) GET /status
}

# Check that the key backend works. Returns a record; with --fail raises an error unless it is healthy.
@category kms
@example "go on only if it works" { kms health --fail; kms encrypt-file config.yaml }
export def health [
    --fail # raise an error unless the status is "healthy"
    --url: string # address of the service, instead of $env.KMS_SERVICE_URL
    --token-file: path # file that holds the token, instead of $env.KMS_TOKEN_FILE
]: nothing -> record {
    let at = reach $url $token_file {
        service: [$url (metadata $url).span]
        token-file: [$token_file (metadata $token_file).span]
    }
    let answer = request $at GET /health
    if $answer.body.status? == null {
        expect $at $answer
    } else if $fail and $answer.body.status != healthy {
        fail $at backend_unavailable $"The backend ($answer.body.backend) is unhealthy"
    } else {
        $answer.body
    }
}

# List the keys you may use.
@category kms
@example "what a backend holds" { kms keys --backend age }
export def keys [
    --backend: string@nu-complete-backends # only keys of this backend
    --url: string # address of the service, instead of $env.KMS_SERVICE_URL
    --token-file: path # file that holds the token, instead of $env.KMS_TOKEN_FILE
]: nothing -> table {
    let found = call (reach $url $token_file {
        service: [$url (metadata $url).span]
        token-file: [$token_file (metadata $token_file).span]
    }) GET /keys | get keys
    if $backend == null { $found } else { $found | where backend == $backend }
}

# Show the header of an encrypted file. No key or service is needed, and nothing is verified.
@category kms
@example "a file of any size" { kms inspect config.yaml.age }
@example "a ciphertext" { open --raw secret.b64 | kms inspect | get key_id }
export def inspect [
    file?: path # the file, instead of what comes through the pipeline
]: [nothing -> record, string -> record, binary -> record] {
    let given = $in
    let at = {spans: (spots {service: [$file (metadata $file).span], source: [$file (metadata $file).span]})}
    if $file == null {
        if $given == null {
            fail $at no_such_file "There is nothing to inspect: name a file, or pipe a ciphertext in" --blame source
        }
        let bytes = $given | into binary | age-bytes $at
        return (inspected $at $bytes ($bytes | bytes length))
    }
    let path = $file | path expand
    if ($path | path type) != file {
        fail $at no_such_file $"There is no file ($file)" --blame source
    }
    let size = ls --all $path | get 0.size | into int
    let start = start $path
    if ($start | bytes starts-with ("age-encryption.org/" | into binary)) or $size > $AT_ONCE_BYTES {
        return (inspected $at $start $size)
    }
    let bytes = open --raw $path | into binary | age-bytes $at
    inspected $at $bytes ($bytes | bytes length)
}
