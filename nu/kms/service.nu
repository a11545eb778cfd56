# The service: its address and token, one request, and the errors of its answers.

export const PREFIX = "/api/v1/kms"
const DEFAULT_URL = "http://localhost:8082"
const LOOPBACK = [localhost "[::1]"]
const LOOPBACK_ADDRESS = '^127(\.(25[0-5]|2[0-4][0-9]|1?[0-9]?[0-9])){3}$'
const ALIVE_WITHIN = 5sec
const ANSWER_WITHIN = 30sec # from the end of a request to the head of its answer; a transfer may take longer
const KNOWS_NO_PROXY = 114 # the minor version of nu that heeds $env.NO_PROXY; one before it takes no exception
const PROXIES = [http_proxy HTTP_PROXY https_proxy HTTPS_PROXY all_proxy ALL_PROXY]

# The argument that most likely causes an error code; others concern the service.
const BLAMED = {
    decrypt_failed: context
    invalid_context: context
    context_required: context
    unknown_key: key-id
    foreign_refused: key-id
    data_keys_unsupported: key-id
    unauthenticated: token-file
    not_a_ciphertext: source
    path_refused: source
    target_exists: target
    unknown_job: job
    job_not_finished: job
    job_not_dead: job
    job_committing: job
    job_cancelled: job
    result_expired: job
    items_failed: job
    attempts_exhausted: job
    record_refused: job
}

const NEXT = {
    decrypt_failed: "give the --context it was encrypted with; `kms inspect` shows the key it names"
    not_a_ciphertext: "give what `kms encrypt` or `kms encrypt-file` wrote"
    invalid_context: 'write it as --context "env=prod,service=api" or --context {env: prod, service: api}'
    context_required: 'add one, as --context "env=prod,service=api"'
    too_large: "use `kms encrypt-file` or `kms decrypt-file`, which take files of any size"
    body_timeout: "send the body without pauses, or over a faster connection"
    unauthenticated: "name the file of your token with --token-file or $env.KMS_TOKEN_FILE, or ask for a new one"
    forbidden: "ask the operator for a token whose scope allows this operation, key, context and path"
    unknown_key: "`kms keys` lists the keys you may use; without --key-id it is the default key"
    unknown_job: "`kms job list` shows your jobs"
    data_keys_unsupported: "use a key of another backend, or let the operator allow data keys for this one"
    result_expired: "submit the job again"
    job_not_finished: "wait for it with `kms job wait`"
    backend_unavailable: "try again later; `kms status` shows more"
    jobs_unavailable: "the service needs Redis and a worker for this: `kms status` says what is missing"
    rate_limited: "try again later"
    spool_full: "wait until results expire, or ask the operator for a larger spool"
    items_failed: "`kms job result` shows which items and why"
    attempts_exhausted: "ask the operator for the log of the worker, then `kms job retry`"
    record_refused: "ask the operator: the record was changed, or a worker has another spool key"
    target_exists: "--force overwrites it, --output names another"
    unexpected_answer: "name its address with --url or $env.KMS_SERVICE_URL: is it this service, of the same version?"
    service_unreachable: "is the service up? $env.KMS_SERVICE_URL or --url names its address"
    in_clear: "use an https:// address, or allow it with $env.KMS_ALLOW_HTTP = 1"
    proxied: "start nu without http_proxy and the like, or take nu 0.114 or later"
    untrusted_certificate: "start nu with SSL_CERT_FILE naming the authorities to trust: it is read once, at the start"
}

# Where the service is, who asks, and where the arguments of the command were written.
#
# An option goes before a variable, and a variable before the default, http://localhost:8082, which must answer as this
# service. `secret` is what no error may show, not even in a line of source that nu would quote.
export def reach [url?: string, token_file?: string, arguments: record = {}, --secret: binary]: nothing -> record {
    let at = {spans: (spots $arguments), secret: $secret}
    let named = $url | default $env.KMS_SERVICE_URL?
    let address = $named | default $DEFAULT_URL
    let parts = try { $address | url parse } catch { {scheme: ""} }
    if $parts.scheme not-in [http https] or ($parts.host | is-empty) {
        fail $at bad_address "The service address must look like http://host:port or https://host"
    }
    if [$parts.username $parts.password $parts.query $parts.fragment] != ["" "" "" ""] {
        fail $at bad_address "The service address holds no user, password or query: use a token file"
    }
    let is_local = $parts.host in $LOOPBACK or $parts.host =~ $LOOPBACK_ADDRESS
    let proxies = $PROXIES | where {|name| $env | get --optional $name | is-not-empty }
    if $is_local and ($proxies | is-not-empty) and (version).minor < $KNOWS_NO_PROXY {
        fail $at proxied "This nu would send the request to the proxy of its environment"
    }
    if $named == null { recognize $at $address }
    let token = bearer $at $token_file
    if $parts.scheme == http and not $is_local and not (allows-http) {
        fail $at in_clear $"Tokens, keys and plaintexts would be sent unencrypted to ($address)"
    }
    {
        ...$at
        url: ($address | str trim --right --char "/")
        is_local: $is_local
        headers: (if $token == null { {} } else { {Authorization: $"Bearer ($token)"} })
    }
}

# Ask whether a service of ours, of any version, has the default address: another program there must receive no secret.
def recognize [at: record, address: string]: nothing -> nothing {
    let id = random uuid
    $env.NO_PROXY = "*"
    let answer = try {
        http get -fer -R manual -m $ALIVE_WITHIN -H {X-Request-ID: $id} $"($address)/livez"
    } catch {|error|
        lost {...$at, url: $address} $error
    }
    let same = understood $answer | get headers | get --optional x-request-id
    if $answer.status != 200 or $same != $id or ($answer.body | into binary) != ("ok\n" | into binary) {
        fail $at unexpected_answer $"What answers at ($address) is not this service, so no secret was sent there"
    }
}

# The spans of those arguments that were given, by name, out of [value span]. One that was not has the span of the
# command, which is what `service` is for.
export def spots [arguments: record]: nothing -> record {
    let given = $arguments | transpose name given | where {|one| $one.name == service or $one.given.0 != null }
    $given | reduce --fold {} {|one, spans| $spans | insert $one.name $one.given.1 }
}

def allows-http []: nothing -> bool {
    ($env.KMS_ALLOW_HTTP? | default "" | into string) =~ "(?i)^(1|true|t|yes|y|on)$"
}

def bearer [at: record, token_file?: string]: nothing -> oneof<string, nothing> {
    let token = read-token $at ($token_file | default $env.KMS_TOKEN_FILE?)
    if $token != null and $token !~ '^[!-~]+$' {
        fail $at bad_token "The token holds characters that no header can carry, or none" --blame token-file
    }
    $token
}

def read-token [at: record, file?: string]: nothing -> oneof<string, nothing> {
    if ($file | is-empty) {
        return null
    }
    try {
        open --raw ($file | path expand) | decode utf-8 | str trim
    } catch {
        fail $at bad_token "The token file cannot be read" --blame token-file
    }
}

# One request, and its answer: a record with `status`, `headers` and `body`.
#
# `http` gives the answer in full (-f), errors (-e) and redirects (-R manual) too, its body as text (-r).
export def request [
    at: record
    method: string
    path: string
    --body: record
    --headers: record = {}
    --within: duration = $ANSWER_WITHIN
]: nothing -> record {
    let address = $"($at.url)($PREFIX)($path)"
    let headers = $at.headers | merge $headers
    if $at.is_local { $env.NO_PROXY = "*" }
    let json = $body | default {} | to json --raw
    let answer = try {
        match $method {
            GET => (http get -fer -R manual -m $within -H $headers $address)
            DELETE => (http delete -fer -R manual -m $within -H $headers $address)
            POST => (http post -fer -R manual -m $within -H $headers -t application/json $address $json)
        }
    } catch {|error|
        lost $at $error
    }
    understood $answer
}

# A file of any size, streamed to the service. Returns the body of a successful answer.
export def upload [at: record, path: string, headers: record, source: string]: nothing -> record {
    if $at.is_local { $env.NO_PROXY = "*" }
    let address = $"($at.url)($PREFIX)($path)"
    let headers = $at.headers | merge $headers
    let answer = try {
        open --raw $source | http post -fer -R manual -H $headers -t application/octet-stream $address
    } catch {|error|
        # A service that refuses may close the line while the file is still being sent; asked again it says why.
        call $at GET "/jobs?limit=1"
        lost $at $error
    }
    expect $at (understood $answer)
}

# An answer of any size, streamed into a file that is there already.
export def download [at: record, path: string, target: string]: nothing -> nothing {
    if $at.is_local { $env.NO_PROXY = "*" }
    try {
        http get --raw --redirect-mode error --headers $at.headers $"($at.url)($PREFIX)($path)" | save --raw --force $target
    } catch {|error|
        lost $at $error
    }
}

# The same to the pipeline.
export def streamed [at: record, path: string]: nothing -> any {
    if $at.is_local { $env.NO_PROXY = "*" }
    http get --raw --redirect-mode error --headers $at.headers $"($at.url)($PREFIX)($path)"
}

# One request whose answer must be a success; its body. Raises the labelled error that a problem means.
export def call [
    at: record
    method: string
    path: string
    --body: record
    --headers: record = {}
]: nothing -> any {
    expect $at (request $at $method $path --body $body --headers $headers)
}

# The body of a successful answer. Raises what any other means.
export def expect [at: record, answer: record]: nothing -> any {
    let body = $answer.body
    let is_ours = ($body | describe) =~ "^record"
    if $is_ours and $answer.status in 200..299 {
        return $body
    }
    if not $is_ours or $body.code? == null {
        fail $at unexpected_answer $"The address answered with status ($answer.status), but not as this service does"
    }
    fail $at $body.code $body.detail --note $"request id ($body.request_id)"
}

# Raise an error: what is wrong, at the argument that is to blame, and what to do next.
export def fail [at: record, code: string, detail: string, --blame: string, --note: string]: nothing -> error {
    let blamed = $blame | default ($BLAMED | get --optional $code) | default service
    let span = $at.spans | get --optional $blamed | default $at.spans.service?
    let help = [($NEXT | get --optional $code) $note] | compact | str join "\n"
    let words = {msg: $"($detail | str trim --right --char '.') \(($code)\)", code: $"kms::($code)"}
    let words = if ($help | is-empty) { $words } else { $words | insert help $help }
    if $span == null or (shows $span $at.secret?) {
        error make --unspanned $words
    }
    error make ($words | insert label {text: (pointed $at $blamed), span: $span})
}

# Words beside the place, which is the command itself where the argument to blame was not given.
def pointed [at: record, blamed: string]: nothing -> string {
    if $blamed == service {
        "here"
    } else if $blamed in $at.spans {
        $"this ($blamed)"
    } else if $blamed in [context token-file] {
        $"without --($blamed)"
    } else {
        "here"
    }
}

# Whether the lines of source that nu would quote, those around the place too, hold some of the secret.
def shows [span: record, secret?: binary]: nothing -> bool {
    if $secret == null {
        return false
    }
    let quoted = try { quoted $span } catch { return true } # what cannot be looked at is not quoted either
    $secret | decode utf-8 | lines | str trim | where ($it | is-not-empty) | any {|line| $quoted | str contains $line }
}

def quoted [span: record]: nothing -> string {
    let file = view files | where start <= $span.start and end >= $span.end | first
    let before = text-between $file.start $span.start | lines | last 3
    let after = text-between $span.end $file.end | lines | first 3
    [...$before (text-between $span.start $span.end) ...$after] | str join
}

# nu before 0.115 does not view nothing.
def text-between [start: int, end: int]: nothing -> string {
    if $start == $end { "" } else { view span $start $end }
}

def understood [answer: record]: nothing -> record {
    let body = try { $answer.body | from json } catch { null }
    let headers = $answer.headers.response | transpose --header-row --as-record --ignore-titles
    {status: $answer.status, headers: $headers, body: $body}
}

# Raise what nu's own error of a request means; its words differ between versions, its code does not.
def lost [at: record, error: record]: nothing -> error {
    if $error.rendered =~ "invalid_data" and ($at.url | str starts-with https) {
        fail $at untrusted_certificate $"Nothing vouches for the certificate of ($at.url)"
    }
    let late = if $error.rendered =~ "timed_out" { " in time" } else { "" }
    fail $at service_unreachable $"No answer from ($at.url)($late)"
}
