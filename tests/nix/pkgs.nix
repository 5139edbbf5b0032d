# As much of a package set as the module evaluates: generated files and scripts are attribute sets that keep what
# they were made from.
{ lib }:
let
  made =
    name: contents:
    {
      type = "derivation";
      outPath = "/made/${name}";
      meta.mainProgram = name;
    }
    // contents;
  format =
    type:
    { ... }:
    {
      inherit type;
      generate = name: value: made name { inherit value; };
    };
  tree =
    with lib.types;
    oneOf [
      bool
      int
      float
      str
      path
      (listOf tree)
      (attrsOf tree)
    ]
    // {
      description = "value of a configuration file";
    };
in
lib.fix (pkgs: {
  stdenv.buildPlatform.canExecute = _: true;
  stdenv.hostPlatform = { };
  buildPackages = pkgs;
  formats.toml = format (lib.types.attrsOf tree);
  formats.json = format tree;
  runCommand =
    name: environment: script:
    made name { inherit environment script; };
  writeShellApplication = args: made args.name { inherit (args) text; };
  circleosd = made "circleosd" { };
  coreutils = made "coreutils" { };
  jq = made "jq" { };
})
