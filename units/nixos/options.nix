# The options of services.circleosd.
{
  config,
  lib,
  pkgs,
  ...
}:
let
  inherit (lib) mkOption types;

  cfg = config.services.circleosd;
  names = import ./names.nix;

  toml = pkgs.formats.toml { };
  json = pkgs.formats.json { };

  unitName =
    types.addCheck (types.strMatching names.unitRule) (unit: lib.stringLength unit <= 255)
    // {
      description = "name of a systemd unit that can be started, with its suffix";
    };

  # Nothing else can be read while a system is built.
  storeFile =
    types.addCheck types.path (file: lib.isPath file || builtins.hasContext "${file}")
    // {
      description = "file as a path or in the Nix store";
      descriptionClass = "composite";
    };

  signer =
    types.strMatching (
      "[^[:space:]#][^\n]* (ssh-ed25519|ssh-rsa|ecdsa-sha2-nistp(256|384|521)"
      + "|sk-(ssh-ed25519|ecdsa-sha2-nistp256)@openssh\\.com) AAAA[A-Za-z0-9+/]+=*( [^\n]*)?\n?"
    )
    // {
      description = "line of an allowed_signers file, such as alice@example.org ssh-ed25519 AAAA…";
    };

  serviceOptions =
    { name, ... }:
    {
      options = {
        unit = mkOption {
          type = unitName;
          default = "${name}.service";
          defaultText = lib.literalExpression ''"''${name}.service"'';
          example = "postgresql.service";
          description = "The systemd unit that this name stands for.";
        };

        description = mkOption {
          type = types.singleLineStr;
          default = "";
          example = "The company's web site";
          description = "What `circlectl service list` says about the service.";
        };

        verbs = mkOption {
          type = types.nonEmptyListOf (types.enum names.verbs);
          default = names.defaultVerbs;
          example = [
            "restart"
            "reload"
          ];
          description = ''
            What the registry may do to the unit. The polkit rule allows these verbs on this unit and no others.

            `enable` and `disable` are not among them: polkit is not told which unit they concern, so no rule could
            confine them, and on NixOS the configuration decides what starts at boot.
          '';
        };
      };
    };

  pluginOptions =
    { config, name, ... }:
    {
      options = {
        package = mkOption {
          type = types.nullOr types.package;
          default = null;
          example = lib.literalExpression "pkgs.circleosd-plugin-reverse";
          description = ''
            A package that holds the plugin as `share/circleosd/plugins/NAME.wasm`, with its manifest `NAME.json` and
            perhaps a signature `NAME.json.sig` beside it.
          '';
        };

        artifact = mkOption {
          type = types.nullOr storeFile;
          default =
            if config.package == null then null else "${config.package}/share/circleosd/plugins/${name}.wasm";
          defaultText = lib.literalExpression ''"''${package}/share/circleosd/plugins/''${name}.wasm"'';
          example = lib.literalExpression "./reverse.wasm";
          description = "The plugin itself, a `.wasm` or `.so` file, as a path or in the Nix store.";
        };

        manifest = mkOption {
          type = types.nullOr (types.either storeFile (types.attrsOf json.type));
          default =
            if config.package == null then null else "${config.package}/share/circleosd/plugins/${name}.json";
          defaultText = lib.literalExpression ''"''${package}/share/circleosd/plugins/''${name}.json"'';
          example = {
            version = "1.0.0";
            description = "Reverses a text";
            plugin_type = "wasm";
          };
          description = ''
            The manifest, as a JSON file or as the values in it. Its `name` must be the name used here, and need not
            be given among values. A signed manifest must be a file, for the signature covers its bytes.
          '';
        };

        signature = mkOption {
          type = types.nullOr storeFile;
          default = null;
          example = lib.literalExpression "./reverse.json.sig";
          description = ''
            The manifest's SSH signature, as made by `circlectl plugin sign`. When null, a file of the manifest's name
            with `.sig` added is taken where a package has one. Native code needs a signature; other plugins do if
            {option}`services.circleosd.settings.plugins.trust` is `"require"`.
          '';
        };

        grant = mkOption {
          type = types.listOf (types.strMatching names.grantRule);
          default = [ ];
          example = [
            "kv"
            "services:restart:nginx"
          ];
          description = ''
            The capabilities granted to the plugin, among those its manifest asks for. Any others that it was granted
            are revoked.
          '';
        };

        sha256 = mkOption {
          type = types.nullOr (types.strMatching "[0-9a-f]{64}");
          default = null;
          example = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
          description = ''
            The SHA-256 digest that the artifact must have, in hexadecimal. The system does not build with an
            artifact of another digest. When null, whatever artifact the configuration names is taken. In both cases
            the plugin manager is told the digest of the file that was built, and loads no other.
          '';
        };
      };
    };
in
{
  options.services.circleosd = {
    enable = lib.mkEnableOption "CircleOSD, limited and accountable control over this host";

    package = mkOption {
      type = types.package;
      default = pkgs.circleosd or (pkgs.callPackage ../package.nix { });
      defaultText = lib.literalMD "`pkgs.circleosd`, or the package that comes with this module";
      description = "The CircleOSD package to use.";
    };

    adminGroup = mkOption {
      type = types.strMatching "[a-z_][a-z0-9_-]{0,30}";
      default = names.socketGroup;
      example = "wheel";
      description = ''
        The Unix group whose members may connect to CircleOSD's sockets. What they may do once connected is decided
        by CircleOSD's roles and grants.

        The sockets belong to the group `${names.socketGroup}`. When another group is named here, the users whom this
        configuration puts into it become members of `${names.socketGroup}` as well; CircleOSD's own users never join the
        group named here.
      '';
    };

    settings = mkOption {
      type = types.submodule {
        freeformType = toml.type;
        options.plugins.trust = mkOption {
          type = types.nullOr (types.enum names.trustPolicies);
          default = if cfg.trustedSigners == [ ] then null else "require";
          defaultText = lib.literalExpression ''if trustedSigners == [ ] then null else "require"'';
          example = "require";
          description = ''
            What to do about a plugin that no trusted signer has signed: refuse it, warn, or nothing. Null leaves it to
            CircleOSD's own default.
          '';
        };
      };
      default = { };
      example = {
        plugins.trust = "require";
      };
      description = ''
        The contents of `/etc/circleosd/config.toml`. The system does not build with settings that the services would
        refuse. The file is readable by everybody, in the Nix store too: put no secrets into it.
      '';
    };

    services = mkOption {
      type = types.attrsOf (types.submodule serviceOptions);
      default = { };
      example = {
        nginx = {
          description = "The company's web site";
          verbs = [
            "restart"
            "reload"
          ];
        };
        database.unit = "postgresql.service";
      };
      description = ''
        The catalog: which systemd units CircleOSD manages, by the names that `circlectl service` knows them by. A name
        has up to 128 of the characters `a-z`, `A-Z`, `0-9`, `_`, `.`, `@`, `:` and `-`, and starts with a letter or a
        digit.
      '';
    };

    plugins = mkOption {
      type = types.attrsOf (types.submodule pluginOptions);
      default = { };
      example = lib.literalExpression ''
        {
          reverse = {
            artifact = ./reverse.wasm;
            manifest = ./reverse.json;
            sha256 = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
            grant = [ "kv" ];
          };
        }
      '';
      description = ''
        Plugins to load, by name. A plugin that is no longer declared is unloaded; those loaded by hand are left alone.
        A name has up to 48 of the characters `a-z`, `0-9`, `_` and `-`, and starts with a letter or a digit.
      '';
    };

    trustedSigners = mkOption {
      type = types.either types.path (types.listOf signer);
      default = [ ];
      example = [
        "ops@example.org namespaces=\"circleosd-plugin\" ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIHOVMfs5L3eb5QE1pBcJPrpYM2cHEv1sBWBZLZ0TlbpM"
      ];
      description = ''
        Whose signatures on plugins are trusted: lines as in the allowed_signers file of {manpage}`ssh-keygen(1)`, or
        such a file.
      '';
    };
  };
}
