# Files of any size: a small one in a single call, a larger one through a job.

use context.nu
use following.nu [ended fetch]
use place.nu written
use service.nu [request expect upload fail]
use text.nu age-bytes

const SUFFIX = ".age"
const SUFFIXES = '\.(age|enc)$' # the second: of files that callers name so
const SINGLE_BYTES = 1048576 # what the service takes in a single call, unless its settings say otherwise
const SINGLE_CIPHERTEXT_BYTES = 1114112
const ARMOR = "-----BEGIN AGE ENCRYPTED FILE-----"

# Encrypt or decrypt one file. `given` holds source, output, context, key_id, priority, callback and force.
# Returns source, output, bytes and job_id, which is null after a single call.
export def convert [at: record, kind: string, given: record]: nothing -> record {
    let given = if $kind == decrypt { $given | update source (found $given.source) } else { $given }
    let source = $given.source | path expand
    if not ($source | path exists) {
        fail $at no_such_file $"There is no file ($given.source)" --blame source
    }
    if ($source | path type) == dir {
        fail $at no_such_file $"($given.source) is a directory" --blame source
    }
    let target = named $at $kind $given
    let job_id = written $at $target $given.force {|draft| fill $at $kind ($given | update source $source) $draft }
    {source: $source, output: $target, bytes: (size $target), job_id: $job_id}
}

# The name of the file to decrypt. In place of a missing NAME.enc it is NAME.age.
def found [name: string]: nothing -> string {
    let other = $name | str replace --regex '\.enc$' $SUFFIX
    if ($name | path exists --no-symlink) or ($other | path expand | path type) != file {
        return $name
    }
    print --stderr $"kms: note: there is no ($name), so this decrypts ($other)"
    $other
}

def named [at: record, kind: string, given: record]: nothing -> string {
    if $given.output != null {
        return ($given.output | path expand --no-symlink)
    }
    let source = $given.source | path expand --no-symlink
    if $kind == encrypt {
        return $"($source)($SUFFIX)"
    }
    let name = $source | path basename
    if $name !~ $"^.+($SUFFIXES)" {
        fail $at no_output $"($name) does not end in ($SUFFIX): name the result with --output" --blame source
    }
    $source | str replace --regex $SUFFIXES ""
}

# Write the result to the draft. Returns the id of the job, if it took one.
def fill [at: record, kind: string, given: record, draft: string]: nothing -> oneof<string, nothing> {
    let limit = if $kind == encrypt { $SINGLE_BYTES } else { $SINGLE_CIPHERTEXT_BYTES }
    let is_small = ($given.source | path type) == file and (size $given.source) <= $limit
    let is_job = $given.priority != null or $given.callback != null # only jobs have these
    if $is_small and not $is_job and (singly $at $kind $given $draft) {
        return null
    }
    if $kind == decrypt and (is-armored $given.source) {
        fail $at too_large "A file in armor is taken up to 1 MiB here" --blame source
    }
    let headers = {
        X-KMS-Key-Id: $given.key_id
        X-KMS-Priority: $given.priority
        X-KMS-Callback: $given.callback
        Idempotency-Key: (random uuid)
        ...(context header $at $given.context)
    }
    let id = upload $at $"/files/($kind)" ($headers | compacted) $given.source | get job_id
    ended $at $id
    fetch $at $id $draft
    $id
}

# One call; false if the service takes less at once than it does by default.
def singly [at: record, kind: string, given: record, draft: string]: nothing -> bool {
    let bytes = open --raw $given.source | into binary
    let at = if $kind == encrypt { $at | update secret $bytes } else { $at }
    let shared = {context: (context parsed $at $given.context), key_id: $given.key_id}
    let body = if $kind == encrypt {
        {plaintext: ($bytes | encode base64), ...$shared}
    } else {
        {ciphertext: ($bytes | age-bytes $at | encode base64), ...$shared}
    }
    let answer = request $at POST $"/($kind)" --body $body
    if $answer.status == 413 {
        return false
    }
    let made = expect $at $answer
    $made | get (if $kind == encrypt { 'ciphertext' } else { 'plaintext' }) | decode base64 | save --raw --force $draft
    true
}

def is-armored [source: string]: nothing -> bool {
    if ($source | path type) != file {
        return false
    }
    open --raw $source | first 64 | decode utf-8 | str trim --left | str starts-with $ARMOR
}

def size [file: string]: nothing -> int {
    ls --all $file | get 0.size | into int
}

def compacted []: record -> record {
    transpose name value | where value != null | transpose --header-row --as-record --ignore-titles
}
