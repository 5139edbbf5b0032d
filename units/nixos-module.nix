{
  config,
  lib,
  pkgs,
  ...
}:
let
  inherit (lib) mkOption types;

  cfg = config.services.circleosd;

  toml = pkgs.formats.toml { };
  json = pkgs.formats.json { };

  # The group that the packaged sockets name.
  socketGroup = "circleosd";

  daemons = [
    "circleosd-auth"
    "circleosd-plugins"
    "circleosd-registry"
  ];

  serviceRule = "[a-z0-9][a-z0-9_.-]{0,63}";
  pluginRule = "[a-z0-9][a-z0-9_-]{0,47}";
  breaks = rule: lib.filter (name: builtins.match rule name == null);

  # Names under which the registry lists CircleOSD itself.
  ownNames = [
    "auth-service"
    "plugin-manager"
    "service-registry"
  ];

  startVerbs = [
    "start"
    "stop"
  ];
  defaultVerbs = startVerbs ++ [ "restart" ];

  unitName =
    types.addCheck (types.strMatching (
      "[a-zA-Z0-9:_.\\-]+(@[a-zA-Z0-9:_.\\-]+)?" + "\\.(mount|path|service|slice|socket|target|timer)"
    )) (unit: lib.stringLength unit <= 255)
    // {
      description = "name of a systemd unit that can be started, with its suffix";
    };

  signer =
    types.strMatching (
      "[^[:space:]#][^\n]* (ssh-ed25519|ssh-rsa|ecdsa-sha2-nistp(256|384|521)"
      + "|sk-(ssh-ed25519|ecdsa-sha2-nistp256)@openssh\\.com) AAAA[A-Za-z0-9+/]+=*( [^\n]*)?"
    )
    // {
      description = "line of an allowed_signers file";
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
          type = types.nonEmptyListOf (
            types.enum [
              "start"
              "stop"
              "restart"
              "reload"
            ]
          );
          default = defaultVerbs;
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
          type = types.nullOr types.path;
          default =
            if config.package == null then null else "${config.package}/share/circleosd/plugins/${name}.wasm";
          defaultText = lib.literalExpression ''"''${package}/share/circleosd/plugins/''${name}.wasm"'';
          example = lib.literalExpression "./reverse.wasm";
          description = "The plugin itself, a `.wasm` or `.so` file, as a path or in the Nix store.";
        };

        manifest = mkOption {
          type = types.nullOr (types.either types.path (types.attrsOf json.type));
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
          type = types.nullOr types.path;
          default = null;
          example = lib.literalExpression "./reverse.json.sig";
          description = ''
            The manifest's SSH signature, as made by `circlectl plugin sign`. When null, a file of the manifest's name
            with `.sig` added is taken where a package has one.
          '';
        };

        grant = mkOption {
          type = types.listOf (types.strMatching "[a-z][a-z0-9-]*(:[A-Za-z0-9_.@*-]+)*");
          default = [ ];
          example = [
            "kv"
            "services:restart:nginx"
          ];
          description = "The capabilities granted to the plugin, among those its manifest asks for.";
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

  isValues = manifest: lib.isAttrs manifest && !lib.isStringLike manifest;

  # One directory for each plugin: its name, files, digest and grants, checked against each other.
  bundle =
    name: plugin:
    pkgs.runCommand "circleosd-plugin-${name}"
      {
        nativeBuildInputs = [ pkgs.jq ];
        plugin = name;
        artifact = "${plugin.artifact}";
        manifest =
          if isValues plugin.manifest then
            json.generate "${name}.json" ({ inherit name; } // plugin.manifest)
          else
            "${plugin.manifest}";
        extension = if lib.hasSuffix ".so" (toString plugin.artifact) then "so" else "wasm";
        signature = lib.optionalString (plugin.signature != null) "${plugin.signature}";
        expected = lib.optionalString (plugin.sha256 != null) plugin.sha256;
        grants = lib.concatMapStrings (capability: capability + "\n") plugin.grant;
      }
      ''
        digest=$(sha256sum <"$artifact")
        digest=''${digest%% *}
        if [[ -n $expected && $digest != "$expected" ]]; then
          echo "cannot use the plugin $plugin: its SHA-256 digest is $digest, not $expected as configured" >&2
          exit 1
        fi
        if ! jq --exit-status --arg name "$plugin" '.name == $name' "$manifest" >/dev/null; then
          echo "cannot use the plugin $plugin: its manifest does not name it so" >&2
          exit 1
        fi
        mkdir $out
        cp "$artifact" "$out/$plugin.$extension"
        cp "$manifest" "$out/$plugin.json"
        if [[ -z $signature && -e $manifest.sig ]]; then
          signature=$manifest.sig
        fi
        if [[ -n $signature ]]; then
          cp "$signature" "$out/$plugin.json.sig"
        fi
        echo "$plugin" >$out/name
        echo "$plugin.$extension" >$out/artifact
        echo "$digest" >$out/sha256
        printf '%s' "$grants" >$out/grants
      '';

  # Brings the loaded plugins in line with the bundles given. The file `names` lists those that are its to unload;
  # plugins loaded by hand are left alone. One plugin that fails does not keep back the others.
  syncPlugins = pkgs.writeShellApplication {
    name = "circleosd-declared-plugins";
    runtimeInputs = [
      cfg.package
      pkgs.coreutils
    ];
    text = ''
      names=$STATE_DIRECTORY/names
      declared=" "
      failed=0
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
          --sha256 "$(<"$bundle/sha256")" "''${options[@]}" || failed=1
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
    '';
  };

  ownUnits = lib.concatMap (daemon: [
    "${daemon}.service"
    "${daemon}.socket"
  ]) daemons;

  verbsByUnit =
    lib.genAttrs ownUnits (_: defaultVerbs)
    // lib.mapAttrs' (_: service: lib.nameValuePair service.unit service.verbs) cfg.services;

  # Whatever else the registry's user asks of systemd is refused, also where another rule would allow it.
  # systemd asks in the same way, unit and verb, whether a transient unit of that name may be started, which would run
  # any command as root where the unit has no file. Only the message tells: it must be the one of an ordinary job.
  polkitRule = ''
    polkit.addRule(function (action, subject) {
        if (subject.user !== "circleosd-registry" || action.id.indexOf("org.freedesktop.systemd1.") !== 0) {
            return polkit.Result.NOT_HANDLED;
        }
        if (action.id !== "org.freedesktop.systemd1.manage-units") {
            return polkit.Result.NO;
        }
        var unit = String(action.lookup("unit"));
        var verb = String(action.lookup("verb"));
        if (action.lookup("polkit.message") !== "Authentication is required to " + verb + " '$(unit)'.") {
            return polkit.Result.NO;
        }
        var verbs = ${builtins.toJSON verbsByUnit};
        var allowed = [];
        if (Object.prototype.hasOwnProperty.call(verbs, unit)) {
            allowed = verbs[unit];
        } else if (/^circleosd-plugin@${pluginRule}(\.staged)?\.(service|socket)$/.test(unit)) {
            allowed = ${builtins.toJSON startVerbs};
        }
        return allowed.indexOf(verb) >= 0 ? polkit.Result.YES : polkit.Result.NO;
    });
  '';

  catalog = toml.generate "circleosd-services.toml" {
    service = lib.mapAttrsToList (name: service: {
      inherit name;
      inherit (service) unit description verbs;
    }) cfg.services;
  };

  configFile = toml.generate "circleosd.toml" (
    lib.filterAttrsRecursive (_: value: value != null) cfg.settings
  );

  # The members of adminGroup that this configuration knows.
  adminUsers = lib.filter (
    user: user.group == cfg.adminGroup || lib.elem cfg.adminGroup user.extraGroups
  ) (lib.attrValues config.users.users);

  units = lib.mapAttrsToList (_: service: service.unit) cfg.services;
  repeated = list: lib.unique (lib.filter (item: lib.count (other: other == item) list > 1) list);
  quoted = lib.concatMapStringsSep ", " (item: "`${item}`");
  refuse = items: message: {
    assertion = items == [ ];
    message = "services.circleosd: ${message items}";
  };
  pluginsWhere = condition: lib.attrNames (lib.filterAttrs condition cfg.plugins);
in
{
  options.services.circleosd = {
    enable = lib.mkEnableOption "CircleOSD, limited and accountable control over this host";

    package = mkOption {
      type = types.package;
      default = pkgs.circleosd or (pkgs.callPackage ./package.nix { });
      defaultText = lib.literalExpression "pkgs.circleosd or (pkgs.callPackage ./package.nix { })";
      description = "The CircleOSD package to use.";
    };

    adminGroup = mkOption {
      type = types.strMatching "[a-z_][a-z0-9_-]{0,30}";
      default = socketGroup;
      example = "wheel";
      description = ''
        The Unix group whose members may connect to CircleOSD's sockets. What they may do once connected is decided
        by CircleOSD's roles and grants.

        The sockets belong to the group `${socketGroup}`. When another group is named here, the users whom this
        configuration puts into it become members of `${socketGroup}` as well; CircleOSD's own users never join the
        group named here.
      '';
    };

    settings = mkOption {
      type = types.submodule {
        freeformType = toml.type;
        options.plugins.trust = mkOption {
          type = types.nullOr (
            types.enum [
              "require"
              "warn"
              "off"
            ]
          );
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
        The contents of `/etc/circleosd/config.toml`. The file is readable by everybody, in the Nix store too: put no
        secrets into it.
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
        has up to 64 of the characters `a-z`, `0-9`, `_`, `.` and `-`, and starts with a letter or a digit.
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

  config = lib.mkIf cfg.enable {
    assertions = [
      (refuse (breaks serviceRule (lib.attrNames cfg.services)) (
        names: "cannot use as names of services: ${quoted names}. A name must match ${serviceRule}."
      ))
      (refuse (breaks pluginRule (lib.attrNames cfg.plugins)) (
        names: "cannot use as names of plugins: ${quoted names}. A name must match ${pluginRule}."
      ))
      (refuse (lib.intersectLists ownNames (lib.attrNames cfg.services)) (
        names: "cannot declare services named ${quoted names}: these are CircleOSD's own."
      ))
      (refuse (lib.filter (unit: lib.elem unit ownUnits || lib.hasPrefix "circleosd-plugin@" unit) units)
        (
          own:
          "cannot declare the units ${quoted own}: CircleOSD's own units are in the catalog by themselves."
        )
      )
      (refuse (repeated units) (
        twice: "cannot declare the units ${quoted twice} under more than one name. Keep one name for each."
      ))
      (refuse (pluginsWhere (_: plugin: plugin.artifact == null || plugin.manifest == null)) (
        names: "cannot load the plugins ${quoted names}: set package, or both artifact and manifest."
      ))
      (refuse (pluginsWhere (
        name: plugin: isValues plugin.manifest && plugin.manifest.name or name != name
      )) (names: "cannot load the plugins ${quoted names}: their manifests have other names."))
      (refuse
        (pluginsWhere (_: plugin: cfg.settings.plugins.trust == "require" && isValues plugin.manifest))
        (
          names:
          "cannot load the plugins ${quoted names} under settings.plugins.trust = \"require\": a manifest given as"
          + " values has no signature. Give the signed file, or set settings.plugins.trust to \"warn\"."
        )
      )
      {
        assertion = cfg.settings.plugins.trust == "require" -> cfg.trustedSigners != [ ];
        message =
          "services.circleosd: settings.plugins.trust = \"require\" would refuse every plugin:"
          + " trustedSigners is empty. Add a signer.";
      }
    ];

    users.groups = lib.genAttrs daemons (_: { }) // {
      ${socketGroup}.members = lib.optionals (cfg.adminGroup != socketGroup) (
        map (user: user.name) adminUsers
      );
    };

    users.users = lib.genAttrs daemons (daemon: {
      isSystemUser = true;
      group = daemon;
      # The services ask each other; the registry also reads the journal of the units it lists.
      extraGroups = [
        socketGroup
      ]
      ++ lib.optional (daemon == "circleosd-registry") "systemd-journal";
      description = "CircleOSD (${lib.removePrefix "circleosd-" daemon})";
    });

    environment.systemPackages = [ cfg.package ];

    environment.etc = {
      "circleosd/config.toml".source = configFile;
      "circleosd/services.d/nixos.toml".source = catalog;
      "circleosd/trusted-signers" =
        if lib.isList cfg.trustedSigners then
          { text = lib.concatMapStrings (line: line + "\n") cfg.trustedSigners; }
        else
          { source = cfg.trustedSigners; };
      "systemd/catalog/circleosd.catalog".source = "${cfg.package}/lib/systemd/catalog/circleosd.catalog";
    };

    security.polkit = {
      enable = true;
      extraConfig = polkitRule;
    };

    systemd.packages = [ cfg.package ];
    systemd.tmpfiles.packages = [ cfg.package ];

    # NixOS does not read [Install] sections.
    systemd.targets.circleosd.wantedBy = [ "multi-user.target" ];
    systemd.sockets = lib.genAttrs daemons (_: {
      wantedBy = [
        "circleosd.target"
        "sockets.target"
      ];
    });

    systemd.services =
      lib.genAttrs daemons (daemon: {
        restartTriggers = [ configFile ] ++ lib.optional (daemon == "circleosd-registry") catalog;
      })
      # The rule comes from this configuration, and so does what starts at boot.
      // lib.genAttrs [ "circleosd-polkit" "circleosd-enable@" "circleosd-disable@" ] (_: {
        enable = false;
      })
      // {
        circleosd-declared-plugins = {
          description = "Plugins declared in the NixOS configuration of CircleOSD";
          wantedBy = [ "multi-user.target" ];
          wants = map (daemon: "${daemon}.socket") daemons;
          after = map (daemon: "${daemon}.socket") daemons;
          restartTriggers = [
            configFile
            config.environment.etc."circleosd/trusted-signers".source
          ];
          # With nothing declared there is work only if something was.
          unitConfig = lib.optionalAttrs (cfg.plugins == { }) {
            ConditionPathExists = "/var/lib/circleosd-declared-plugins/names";
          };
          environment.HOME = "%S/circleosd-declared-plugins";
          serviceConfig = {
            Type = "oneshot";
            RemainAfterExit = true;
            ExecStart = toString ([ (lib.getExe syncPlugins) ] ++ lib.mapAttrsToList bundle cfg.plugins);
            StateDirectory = "circleosd-declared-plugins";
            StateDirectoryMode = "0700";
            UMask = "0077";
            CapabilityBoundingSet = "";
            LockPersonality = true;
            NoNewPrivileges = true;
            PrivateDevices = true;
            PrivateNetwork = true;
            PrivateTmp = true;
            ProtectClock = true;
            ProtectControlGroups = true;
            ProtectHome = true;
            ProtectHostname = true;
            ProtectKernelLogs = true;
            ProtectKernelModules = true;
            ProtectKernelTunables = true;
            ProtectSystem = "strict";
            RestrictAddressFamilies = [ "AF_UNIX" ];
            RestrictNamespaces = true;
            RestrictRealtime = true;
            RestrictSUIDSGID = true;
            SystemCallArchitectures = "native";
            SystemCallErrorNumber = "EPERM";
            SystemCallFilter = [
              "@system-service"
              "~@privileged"
              "~@resources"
            ];
          };
        };
      };
    systemd.paths.circleosd-polkit.enable = false;
  };
}
