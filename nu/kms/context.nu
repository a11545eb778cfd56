# The encryption context as commands take it: "env=prod,service=api", a JSON object in a string, or a record.

use service.nu fail

# For the body of a call: null, a string, or a record of strings.
export def parsed [at: record, context?: any, --blame: string = "context"]: nothing -> any {
    match ($context | describe | split row "<" | first) {
        nothing => null
        string if ($context | str starts-with "{") => (from-json-object $at $context $blame | texts $at $blame)
        string => $context
        record => ($context | texts $at $blame)
        $kind => (fail $at invalid_context $"A context is a string or a record, not a ($kind)" --blame $blame)
    }
}

# For a header: percent-encoded UTF-8; empty without a context.
export def header [at: record, context?: any]: nothing -> record {
    let context = parsed $at $context
    if ($context | is-empty) {
        return {}
    }
    let text = if ($context | describe) == string { $context } else { $context | to json --raw }
    {X-KMS-Context: ($text | url encode --all)}
}

def from-json-object [at: record, text: string, blame: string]: nothing -> record {
    let read = try { $text | from json } catch { null }
    if ($read | describe) !~ "^record" {
        fail $at invalid_context "The context is not a JSON object of strings" --blame $blame
    }
    $read
}

def texts [at: record, blame: string]: record -> record {
    let pairs = $in | transpose key value
    if ($pairs | any {|pair| ($pair.value | describe) not-in [string int bool] }) {
        fail $at invalid_context "The values of a context are strings, whole numbers or booleans" --blame $blame
    }
    $pairs | reduce --fold {} {|pair, all| $all | insert $pair.key ($pair.value | into string) }
}
