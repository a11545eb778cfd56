# Follows a submitted job to its end and fetches its result.

use service.nu [request expect fail download PREFIX]

const FIRST_PAUSE = 100ms
const SLOWEST_PAUSE = 2sec
const OUTAGE = 1min # a job survives a restart of its service, and so does a wait
const ENDED = [succeeded failed cancelled]
const WHY = {
    items_failed: "Items failed"
    attempts_exhausted: "The job used up its attempts"
    record_refused: "The stored record of the job was changed"
}

# Wait until the job succeeds. Raises the error that it failed with, and job_not_finished after `timeout`.
export def ended [
    at: record
    id: string
    --timeout: duration
    --progress: closure
]: nothing -> record {
    let begun = date now
    mut answered = $begun
    mut pause = $FIRST_PAUSE
    mut job: any = null
    while $job.state? not-in $ENDED {
        let found = look $at $id ((date now) - $answered < $OUTAGE)
        if $found != null {
            $answered = date now
            if $found != $job {
                report $found $progress
                $job = $found
                $pause = $FIRST_PAUSE
            }
        }
        if $job.state? not-in $ENDED {
            if $timeout != null and (date now) - $begun >= $timeout {
                fail $at job_not_finished $"The job has not ended in ($timeout)"
            }
            sleep $pause
            $pause = [($pause * 1.5) $SLOWEST_PAUSE] | math min
        }
    }
    check $at $job
    $job
}

# Report a state to the closure, and in a terminal as a line that is erased when the job ends.
def report [job: record, progress?: closure]: nothing -> nothing {
    if $progress != null {
        do $progress $job | ignore
    }
    if (is-terminal --stderr) {
        let line = if $job.state in $ENDED { "" } else { $job | summary }
        print --stderr --no-newline $"\r(ansi erase_line)($line)"
    }
}

# The state of the job; null if the service does not answer and `bear` allows it.
def look [at: record, id: string, bear: bool]: nothing -> oneof<record, nothing> {
    let answer = try {
        request $at GET (at-job $id)
    } catch {|error|
        if $bear { return null }
        $error.raw
    }
    if $bear and $answer.status in [429 502 503 504] { null } else { shaped (expect $at $answer) }
}

def check [at: record, job: record]: nothing -> nothing {
    if $job.state == cancelled {
        fail $at job_cancelled "The job was cancelled"
    }
    if $job.state == failed {
        let code = $job.error?.code? | default internal
        fail $at $code ($WHY | get --optional $code | default "The job failed") --note $"job ($job.job_id)"
    }
}

# A line of progress.
def summary []: record -> string {
    let job = $in
    let progress = $job.progress
    let items = if $progress.items > 0 { $", ($progress.items_done) of ($progress.items) items" } else { "" }
    let bytes = if $progress.bytes > 0 {
        $", ($progress.bytes_done | into filesize) of ($progress.bytes | into filesize)"
    } else {
        ""
    }
    $"kms: job ($job.state)($items)($bytes)"
}

# The result into a file that is there: streamed, and checked for its length.
export def fetch [at: record, id: string, target: string]: nothing -> nothing {
    let size = result $at $id | get bytes
    if $size > 0 {
        download $at $"(at-job $id)/result" $target
    }
    if (ls --all $target | get 0.size | into int) != $size {
        fail $at service_unreachable "The result broke off"
    }
}

# Its size in bytes, and whether it is lines of JSON. Raises job_not_finished, result_expired and the like.
export def result [at: record, id: string]: nothing -> record {
    let answer = request $at GET $"(at-job $id)/result" --headers {Range: "bytes=0-0"}
    let range = $answer.headers.content-range?
    if $answer.status not-in [206 416] or $range == null {
        expect $at $answer
    }
    {bytes: ($range | split row "/" | last | into int), lines: ($answer.headers.content-type =~ ndjson)}
}

# A job as commands show it: times as times, and no links, which are paths of the service.
export def shaped [job: record]: nothing -> record {
    let times = $job | select --optional created_at expires_at not_before | transpose name value | where value != null
    $times | reduce --fold ($job | reject --optional links) {|time, job|
        $job | update $time.name ($time.value | into datetime)
    }
}

export def at-job [id: string]: nothing -> string {
    $"/jobs/($id | url encode --all)"
}
