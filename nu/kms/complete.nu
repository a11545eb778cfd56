# Completions. There are none if the service does not answer within 300 ms, so that typing is not delayed.

use service.nu [reach request]

const COMPLETE_WITHIN = 300ms
export const SPECS = [AES_128 AES_256]
export const STATES = [queued running committing succeeded failed cancelled]
export const KINDS = [encrypt decrypt rewrap reseal]
export const PRIORITIES = [high normal low]

export def nu-complete-keys []: nothing -> list<any> {
    offered "/keys" keys | each {|key|
        let default = if $key.default { ", default" } else { "" }
        {value: $key.id, description: $"($key.backend), version ($key.current_version)($default)"}
    }
}

export def nu-complete-backends []: nothing -> list<string> {
    offered "/keys" keys | get backend | uniq
}

export def nu-complete-jobs []: nothing -> record {
    jobs-where {|job| true }
}

export def nu-complete-open-jobs []: nothing -> record {
    jobs-where {|job| $job.state in [queued running] }
}

export def nu-complete-dead-jobs []: nothing -> record {
    jobs-where {|job| $job.state == failed and $job.error?.code? in [attempts_exhausted record_refused] }
}

# Newest first, as the service lists them.
def jobs-where [wanted: closure]: nothing -> record {
    let jobs = offered "/jobs?limit=50" jobs | where {|job| do $wanted $job }
    let offers = $jobs | each {|job|
        {value: $job.job_id, description: $"($job.kind), ($job.state), ($job.created_at)"}
    }
    {options: {sort: false}, completions: $offers}
}

def offered [path: string, field: string]: nothing -> list<any> {
    try { request (reach) GET $path --within $COMPLETE_WITHIN | get body | get $field } catch { [] }
}
