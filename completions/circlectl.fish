# Completion of circlectl for fish. Put it into ~/.config/fish/completions under the name circlectl.fish.

function __circlectl_candidates
    set -l words (commandline -opc)
    set -l current (commandline -ct)
    set -l found ($words[1] --complete fish $words[2..] "$current" 2>/dev/null)
    if test $status -eq 10
        set -l flag (string match --regex -- '^--[^=]*=' "$current")
        for path in (__fish_complete_path (string replace -- "$flag" '' "$current"))
            printf '%s\n' "$flag$path"
        end
    else if set -q found[1]
        printf '%s\n' $found
    end
end

complete -c circlectl -f -a '(__circlectl_candidates)'
