# Files of any size, by name.

use complete.nu *
use transfer.nu convert
use service.nu reach

# Encrypt a file of any size into SOURCE.age or --output. The source stays as it is.
#
# Up to 1 MiB goes in a single call. A larger file streams through a job, in constant memory. The result is a file that
# only you can read, and it appears whole or not at all.
@category kms
@search-terms seal
@example "into config.yaml.age" { kms encrypt-file config.yaml }
@example "under another name" { kms encrypt-file secrets.json --output secrets.age --context "env=prod" }
export def encrypt-file [
    source: path # the file
    --output (-o): path # where to write the result
    --context: oneof<string, record> # encryption context, as "env=prod,service=api" or {env: prod, service: api}
    --key-id: string@nu-complete-keys # key to use instead of the default one
    --priority: string@$PRIORITIES # of the job: before (high) or after (low) others that wait
    --callback: string # endpoint of the service's settings to notify of its end
    --force (-f) # overwrite the result if it is there
    --url: string # address of the service, instead of $env.KMS_SERVICE_URL
    --token-file: path # file that holds the token, instead of $env.KMS_TOKEN_FILE
]: nothing -> record {
    let at = reach $url $token_file {
        service: [$url (metadata $url).span]
        token-file: [$token_file (metadata $token_file).span]
        context: [$context (metadata $context).span]
        key-id: [$key_id (metadata $key_id).span]
        source: [$source (metadata $source).span]
        target: [$output (metadata $output).span]
    }
    convert $at encrypt {
        source: $source
        output: $output
        context: $context
        key_id: $key_id
        priority: $priority
        callback: $callback
        force: $force
    }
}

# Decrypt a file of any size into its name without .age or --output, for you alone to read.
#
# It goes as `kms encrypt-file` does; nothing is written before the last byte has proven genuine. Where NAME.enc is not
# there and NAME.age is, it takes that, and says so.
@category kms
@search-terms open
@example "into config.yaml" { kms decrypt-file config.yaml.age }
@example "under another name" { kms decrypt-file secrets.age --output secrets.json --context "env=prod" }
export def decrypt-file [
    source: path # the file
    --output (-o): path # where to write the result
    --context: oneof<string, record> # the context it was encrypted with
    --key-id: string@nu-complete-keys # needed only for files that another age tool made
    --priority: string@$PRIORITIES # of the job: before (high) or after (low) others that wait
    --callback: string # endpoint of the service's settings to notify of its end
    --force (-f) # overwrite the result if it is there
    --url: string # address of the service, instead of $env.KMS_SERVICE_URL
    --token-file: path # file that holds the token, instead of $env.KMS_TOKEN_FILE
]: nothing -> record {
    let at = reach $url $token_file {
        service: [$url (metadata $url).span]
        token-file: [$token_file (metadata $token_file).span]
        context: [$context (metadata $context).span]
        key-id: [$key_id (metadata $key_id).span]
        source: [$source (metadata $source).span]
        target: [$output (metadata $output).span]
    }
    convert $at decrypt {
        source: $source
        output: $output
        context: $context
        key_id: $key_id
        priority: $priority
        callback: $callback
        force: $force
    }
}
