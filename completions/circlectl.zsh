#compdef circlectl
# Completion of circlectl for zsh. Put it into a directory of $fpath under the name _circlectl.

_circlectl() {
    local found item ret=0
    local -a names shown
    found=$("${(Q)words[1]}" --complete zsh "${(@Q)words[2,CURRENT-1]}" "$PREFIX" 2>/dev/null) || ret=$?
    if (( ret == 10 )); then
        compset -P 1 '--*=' # a flag's value
        _files
        return
    fi
    [[ -n $found ]] || return 1
    for item in "${(@f)found}"; do
        names+=("${item%%$'\t'*}")
        shown+=("${item/$'\t'/  -- }")
    done
    compadd -l -d shown -a names
}

if [[ $zsh_eval_context[-1] == loadautofunc ]]; then
    _circlectl "$@"
else
    compdef _circlectl circlectl
fi
