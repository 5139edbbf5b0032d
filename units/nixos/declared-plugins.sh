# Makes the loaded plugins match the given bundles (plugin-bundle.sh). The file `names` lists those that this may
# unload; plugins loaded by hand are left alone. A failure of one plugin does not affect the others.
names=$STATE_DIRECTORY/names
declared=" "
failed=0

# revoke_others NAME GRANTS: revoke a plugin's grants that the file GRANTS does not list; a load keeps them.
revoke_others() {
    local shown others capability status=0
    shown=$(circlectl plugin show "$1" --json) || return
    # While a kind is granted with `*`, single names of it cannot be revoked; `log` never can.
    others=$(jq --raw-output --rawfile grants "$2" '
        ($grants | split("\n")) as $declared
        | [.capabilities[] | select(.granted).name
            | select(IN("log", $declared[]) or (sub("[^:]*$"; "*") | IN($declared[])) | not)]
        | if IN("all"; $declared[]) then empty else sort_by(endswith(":*") | not)[] end
    ' <<<"$shown") || return
    while IFS= read -r capability; do
        if [[ -n $capability ]]; then
            circlectl plugin revoke "$1" "$capability" || status=$?
        fi
    done <<<"$others"
    return "$status"
}

touch "$names"
: >"$names.new"

for bundle in "$@"; do
    name=$(<"$bundle/name")
    options=()
    while IFS= read -r capability; do
        options+=(--grant "$capability")
    done <"$bundle/grants"
    declared+="$name "
    echo "$name" | tee -a "$names.new" >>"$names"
    circlectl plugin load "$bundle/$(<"$bundle/artifact")" --manifest "$bundle/$name.json" \
        --sha256 "$(<"$bundle/sha256")" "${options[@]}" || {
        echo "cannot load the declared plugin $name, for the reason above" >&2
        failed=1
    }
    revoke_others "$name" "$bundle/grants" || failed=1
done

while IFS= read -r name; do
    if [[ $declared == *" $name "* ]]; then
        continue
    fi
    if ! answer=$(circlectl plugin unload "$name" --json 2>&1) && [[ $answer != *not-found* ]]; then
        echo "$answer" >&2
        echo "$name" >>"$names.new"
        failed=1
    fi
done <"$names"

mv "$names.new" "$names"
exit "$failed"
