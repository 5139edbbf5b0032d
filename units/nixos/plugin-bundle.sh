# Puts a plugin's files, digest and grants into the directory $out, checked against each other.
# From the environment: plugin (its name), artifact, extension, manifest, signature, trust (settings.plugins.trust),
# expected (the digest), grants.
digest=$(sha256sum <"$artifact")
digest=${digest%% *}
if [[ -n $expected && $digest != "$expected" ]]; then
    echo "cannot use the plugin $plugin: its SHA-256 digest is $digest, not $expected as configured" >&2
    exit 1
fi
if ! jq --exit-status --arg name "$plugin" '.name == $name' "$manifest" >/dev/null; then
    echo "cannot use the plugin $plugin: its manifest is not a JSON object with the name $plugin" >&2
    exit 1
fi
stated=$(jq --raw-output '.sha256 // empty' "$manifest")
if [[ -n $stated && $stated != "$digest" ]]; then
    echo "cannot use the plugin $plugin: its manifest is for another artifact, with the SHA-256 digest $stated" >&2
    exit 1
fi
if [[ -z $signature && -e $manifest.sig ]]; then
    signature=$manifest.sig
fi
if [[ -z $signature && ($trust == require || $extension == so) ]]; then
    echo "cannot use the plugin $plugin: it has no signature, which native code needs, and with" \
        "settings.plugins.trust = \"require\" every plugin. Set plugins.$plugin.signature." >&2
    exit 1
fi
mkdir "$out"
cp "$artifact" "$out/$plugin.$extension"
cp "$manifest" "$out/$plugin.json"
if [[ -n $signature ]]; then
    cp "$signature" "$out/$plugin.json.sig"
fi
echo "$plugin" >"$out/name"
echo "$plugin.$extension" >"$out/artifact"
echo "$digest" >"$out/sha256"
printf '%s' "$grants" >"$out/grants"
