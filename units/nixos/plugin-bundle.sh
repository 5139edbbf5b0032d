# Puts a plugin's files, digest and grants into the directory $out, checked against each other.
# From the environment: plugin (its name), artifact, extension, manifest, signature, expected (the digest), grants.
digest=$(sha256sum <"$artifact")
digest=${digest%% *}
if [[ -n $expected && $digest != "$expected" ]]; then
    echo "cannot use the plugin $plugin: its SHA-256 digest is $digest, not $expected as configured" >&2
    exit 1
fi
if ! jq --exit-status --arg name "$plugin" '.name == $name' "$manifest" >/dev/null; then
    echo "cannot use the plugin $plugin: its manifest has another name" >&2
    exit 1
fi
mkdir "$out"
cp "$artifact" "$out/$plugin.$extension"
cp "$manifest" "$out/$plugin.json"
if [[ -z $signature && -e $manifest.sig ]]; then
    signature=$manifest.sig
fi
if [[ -n $signature ]]; then
    cp "$signature" "$out/$plugin.json.sig"
fi
echo "$plugin" >"$out/name"
echo "$plugin.$extension" >"$out/artifact"
echo "$digest" >"$out/sha256"
printf '%s' "$grants" >"$out/grants"
