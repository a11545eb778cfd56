# Writes a file (0600) that appears complete or not at all.

use service.nu fail

# Run `make` with the name of a draft to fill, and put that at `target`. Returns what `make` returned.
export def written [at: record, target: string, force: bool, make: closure]: nothing -> any {
    if not $force and ($target | path exists --no-symlink) {
        fail $at target_exists $"($target) exists"
    }
    let folder = $target | path dirname
    if ($folder | path expand | path type) != dir {
        fail $at no_such_directory $"There is no directory ($folder)" --blame target
    }
    # mktemp makes a file that its owner alone can read, and saving into one keeps the mode.
    let draft = try {
        mktemp --tmpdir-path $folder $".($target | path basename).XXXXXXXX"
    } catch {
        fail $at not_placed $"No file can be made in ($folder)" --blame target
    }
    try {
        let made = do $make $draft
        place $at $draft $target $force
        $made
    } catch {|error|
        rm --force --permanent $draft
        $error.raw
    }
}

# On disk first. Without --force never over what is there: a link replaces no file, where a rename would replace
# one that was made at the same time.
def place [at: record, draft: string, target: string, force: bool]: nothing -> nothing {
    if $nu.os-info.family == windows {
        if $force { mv --force $draft $target } else { mv --no-clobber $draft $target }
        return
    }
    do { ^sync $draft } | complete | ignore
    if $force {
        mv --force $draft $target
        return
    }
    let linked = do { ^ln -- $draft $target } | complete
    if $linked.exit_code == 0 {
        rm --force --permanent $draft
    } else if ($target | path exists --no-symlink) {
        fail $at target_exists $"($target) exists"
    } else {
        fail $at not_placed $"Cannot put the result at ($target)" --blame target
    }
}
