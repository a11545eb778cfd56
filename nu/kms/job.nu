# Jobs of the service.

use complete.nu *
use context.nu
use following.nu [ended fetch result shaped at-job]
use place.nu written
use service.nu [reach call fail streamed]
use text.nu [age-bytes text-or-bytes]

# List jobs, newest first.
@category kms
@example "what is still to be done" { kms job list --state queued }
export def "job list" [
    --state: string@$STATES # only jobs in this state
    --limit: int = 20 # at most so many, up to 1000
    --dead # only dead letters: jobs that used up their attempts
    --url: string # address of the service, instead of $env.KMS_SERVICE_URL
    --token-file: path # file that holds the token, instead of $env.KMS_TOKEN_FILE
]: nothing -> table {
    let at = reach $url $token_file {
        service: [$url (metadata $url).span]
        token-file: [$token_file (metadata $token_file).span]
    }
    let asked = if $state == null { "" } else { $"&state=($state | url encode --all)" }
    let path = if $dead { $"/jobs/dead?limit=($limit)" } else { $"/jobs?limit=($limit)($asked)" }
    call $at GET $path | get jobs | each {|job| shaped $job }
}

# Show the state of a job.
@category kms
@example "how far is it" { kms job get 0b7c1d2e-4f5a-4b6c-8d7e-9f0a1b2c3d4e | get progress }
export def "job get" [
    id: string@nu-complete-jobs # its id
    --url: string # address of the service, instead of $env.KMS_SERVICE_URL
    --token-file: path # file that holds the token, instead of $env.KMS_TOKEN_FILE
]: nothing -> record {
    let at = reach $url $token_file {
        service: [$url (metadata $url).span]
        token-file: [$token_file (metadata $token_file).span]
        job: [$id (metadata $id).span]
    }
    shaped (call $at GET (at-job $id))
}

# Wait until a job ends; fail if it failed.
#
# Ctrl-C ends the wait, not the job. A terminal shows the progress; a closure receives each observed state.
@category kms
@example "at most an hour, and say how it goes" {
    kms job wait 0b7c1d2e-4f5a-4b6c-8d7e-9f0a1b2c3d4e --timeout 1hr --progress {|job| print $job.state }
}
export def "job wait" [
    id: string@nu-complete-open-jobs # its id
    --timeout: duration # fail after so long, with the code job_not_finished
    --progress: closure # called with the job whenever it has moved
    --url: string # address of the service, instead of $env.KMS_SERVICE_URL
    --token-file: path # file that holds the token, instead of $env.KMS_TOKEN_FILE
]: nothing -> record {
    let at = reach $url $token_file {
        service: [$url (metadata $url).span]
        token-file: [$token_file (metadata $token_file).span]
        job: [$id (metadata $id).span]
    }
    ended $at $id --timeout $timeout --progress $progress
}

# Cancel a job: immediately if it is queued, at its next item or block if it runs.
@category kms
@example "all that still wait" { kms job list --state queued | each {|job| kms job cancel $job.job_id } }
export def "job cancel" [
    id: string@nu-complete-open-jobs # its id
    --url: string # address of the service, instead of $env.KMS_SERVICE_URL
    --token-file: path # file that holds the token, instead of $env.KMS_TOKEN_FILE
]: nothing -> record {
    let at = reach $url $token_file {
        service: [$url (metadata $url).span]
        token-file: [$token_file (metadata $token_file).span]
        job: [$id (metadata $id).span]
    }
    shaped (call $at DELETE (at-job $id))
}

# Retry a job that used up its attempts.
@category kms
@example "all of them" { kms job list --dead | each {|job| kms job retry $job.job_id } }
export def "job retry" [
    id: string@nu-complete-dead-jobs # its id
    --url: string # address of the service, instead of $env.KMS_SERVICE_URL
    --token-file: path # file that holds the token, instead of $env.KMS_TOKEN_FILE
]: nothing -> record {
    let at = reach $url $token_file {
        service: [$url (metadata $url).span]
        token-file: [$token_file (metadata $token_file).span]
        job: [$id (metadata $id).span]
    }
    shaped (call $at POST $"(at-job $id)/retry")
}

# Fetch the result of a job: a table of its items, or the bytes of its file.
#
# A row holds `ciphertext` as text in base64, or `plaintext` as text or bytes, or `error`, the code of a refusal. With
# --output the bytes go to a file that only you can read, whole or not at all, in constant memory.
@category kms
@example "the ciphertexts of a bulk job" { kms job result 0b7c1d2e-4f5a-4b6c-8d7e-9f0a1b2c3d4e | get ciphertext }
export def "job result" [
    id: string@nu-complete-jobs # its id
    --output (-o): path # write it to this file
    --force (-f) # overwrite the file if it is there
    --url: string # address of the service, instead of $env.KMS_SERVICE_URL
    --token-file: path # file that holds the token, instead of $env.KMS_TOKEN_FILE
]: nothing -> any {
    let at = reach $url $token_file {
        service: [$url (metadata $url).span]
        token-file: [$token_file (metadata $token_file).span]
        job: [$id (metadata $id).span]
        target: [$output (metadata $output).span]
    }
    if $output != null {
        let target = $output | path expand --no-symlink
        return (written $at $target $force {|draft| fetch $at $id $draft })
    }
    if (result $at $id).lines {
        streamed $at $"(at-job $id)/result" | decode utf-8 | lines | each {|line| item ($line | from json) }
    } else {
        streamed $at $"(at-job $id)/result"
    }
}

# Submit a job over items of the pipeline, or over files on the host of the service.
#
# Items are text or bytes, or records with `plaintext` or `ciphertext` and a `context` of their own, up to 10,000 and
# 16 MiB. Without them the job reads SOURCE and writes TARGET: file:///path or s3://bucket/key, or an absolute path
# there. A source with * in it names many files, and the target is then a directory, ending in a slash. Returns the
# job's id, or with --wait the job; Ctrl-C ends the wait, not the job.
@category kms
@example "many secrets at once" { [alpha beta] | kms job submit encrypt --context env=prod --wait }
@example "a directory where the service runs" { kms job submit encrypt /srv/in/** /srv/out/ --context env=prod }
export def "job submit" [
    kind: string@$KINDS # encrypt, decrypt, rewrap or reseal
    source?: string # what the service is to read
    target?: string # where it is to write; leave it out to rewrap or reseal in place
    --context: oneof<string, record> # encryption context, as "env=prod,service=api" or {env: prod, service: api}
    --new-context: oneof<string, record> # bind this instead of --context
    --key-id: string@nu-complete-keys # key to use instead of the default one
    --overwrite # replace what is there; without a target the source
    --dry-run # of many files: count what would change, touch nothing
    --ttl: duration # how long the job may take and be kept
    --priority: string@$PRIORITIES # before (high) or after (low) other jobs that wait
    --callback: string # endpoint of the service's settings to notify of its end
    --wait # wait for its end, and fail as it failed
    --progress: closure # with --wait: called with the job whenever it has moved
    --url: string # address of the service, instead of $env.KMS_SERVICE_URL
    --token-file: path # file that holds the token, instead of $env.KMS_TOKEN_FILE
]: [nothing -> oneof<string, record>, list<any> -> oneof<string, record>] {
    let items = $in
    let contents = $items | default [] | each {|given| content $given } | where ($it | describe) in [string binary]
    let secret = $contents | each { into binary } | bytes collect (char newline | into binary)
    let at = reach --secret $secret $url $token_file {
        service: [$url (metadata $url).span]
        token-file: [$token_file (metadata $token_file).span]
        context: [$context (metadata $context).span]
        new-context: [$new_context (metadata $new_context).span]
        key-id: [$key_id (metadata $key_id).span]
        source: [$source (metadata $source).span]
        target: [$target (metadata $target).span]
        job: [$kind (metadata $kind).span]
    }
    for given in ($items | default []) {
        checked-item $at $kind $given # `each` would wrap the error of a wrong item into one that says nothing
    }
    let body = {
        kind: $kind
        items: (if $items == null { null } else { $items | each {|given| checked-item $at $kind $given } })
        source: ($source | located)
        target: ($target | located)
        context: (context parsed $at $context)
        new_context: (context parsed $at $new_context --blame new-context)
        key_id: $key_id
        overwrite: $overwrite
        dry_run: $dry_run
        ttl_s: (if $ttl == null { null } else { $ttl // 1sec })
        priority: $priority
        callback: $callback
    }
    let id = call $at POST /jobs --body $body --headers {Idempotency-Key: (random uuid)} | get job_id
    if not $wait {
        return $id
    }
    if (is-terminal --stderr) {
        print --stderr $"kms: job ($id)"
    }
    ended $at $id --progress $progress
}

# An item as the service takes it.
def checked-item [at: record, kind: string, given: any]: nothing -> record {
    let content = content $given
    if ($content | describe) not-in [string binary] {
        fail $at invalid_request "An item is text, bytes, or a record with plaintext or ciphertext" --blame job
    }
    let context = if ($given | describe) =~ "^record" { context parsed $at $given.context? --blame job } else { null }
    if $kind == encrypt {
        {plaintext: ($content | encode base64), context: $context}
    } else {
        {ciphertext: ($content | into binary | age-bytes $at --blame job | encode base64), context: $context}
    }
}

def content [given: any]: nothing -> any {
    if ($given | describe) =~ "^record" { $given.plaintext? | default $given.ciphertext? } else { $given }
}

# A line of a bulk result.
def item [line: record]: nothing -> record {
    let line = if $line.plaintext? == null { $line } else { $line | update plaintext { decode base64 | text-or-bytes } }
    if $line.error? == null { $line } else { $line | update error $line.error.code }
}

# A path as a URL, its stars left to be wildcards.
def located []: oneof<string, nothing> -> oneof<string, nothing> {
    let text = $in
    if $text == null or not ($text | str starts-with "/") {
        return $text
    }
    $"file://($text | url encode --all | str replace --all "%2F" "/" | str replace --all "%2A" "*")"
}
