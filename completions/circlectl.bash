# Completion of circlectl for bash. Source it, or put it where bash-completion looks, under the name circlectl.

_circlectl() {
    local found status=0
    found=$("$1" --complete bash "${COMP_LINE:0:COMP_POINT}" "$COMP_WORDBREAKS" 2>/dev/null) || status=$?
    COMPREPLY=()
    if [[ $status == 10 ]]; then
        compopt -o default 2>/dev/null # names of files
    elif [[ $found ]]; then
        mapfile -t COMPREPLY <<<"$found"
    fi
}
complete -F _circlectl circlectl
