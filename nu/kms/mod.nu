# The key management service from Nushell: secrets, files and jobs.
#
# `use nu/kms`, then `kms encrypt`, `kms decrypt`, … The address of the service is $env.KMS_SERVICE_URL (default
# http://localhost:8082), the file that holds your token $env.KMS_TOKEN_FILE. `help kms` lists the commands.

export use about.nu *
export use files.nu *
export use job.nu *
export use secrets.nu *

# Show the state and the counters of the service, as `kms status` does.
@category kms
export def main [
    --url: string # address of the service, instead of $env.KMS_SERVICE_URL
    --token-file: path # file that holds the token, instead of $env.KMS_TOKEN_FILE
]: nothing -> record {
    status --url $url --token-file $token_file
}
