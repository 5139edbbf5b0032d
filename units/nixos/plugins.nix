# services.circleosd.plugins: a bundle for each, and the service that makes the plugin manager load them.
{
  config,
  lib,
  pkgs,
  ...
}:
let
  cfg = config.services.circleosd;
  names = import ./names.nix;

  isValues = manifest: lib.isAttrs manifest && !lib.isStringLike manifest;
  pluginsWhere = condition: lib.attrNames (lib.filterAttrs condition cfg.plugins);
  refuse = import ./refuse.nix lib;

  bundle =
    name: plugin:
    pkgs.runCommand "circleosd-plugin-${name}" {
      nativeBuildInputs = [ pkgs.buildPackages.jq ];
      plugin = name;
      artifact = "${plugin.artifact}";
      extension = if lib.hasSuffix ".so" (toString plugin.artifact) then "so" else "wasm";
      manifest =
        if isValues plugin.manifest then
          (pkgs.formats.json { }).generate "${name}.json" ({ inherit name; } // plugin.manifest)
        else
          "${plugin.manifest}";
      signature = lib.optionalString (plugin.signature != null) "${plugin.signature}";
      trust = toString cfg.settings.plugins.trust;
      expected = lib.optionalString (plugin.sha256 != null) plugin.sha256;
      grants = lib.concatMapStrings (capability: capability + "\n") plugin.grant;
    } (builtins.readFile ./plugin-bundle.sh);

  load = pkgs.writeShellApplication {
    name = "circleosd-declared-plugins";
    runtimeInputs = [
      cfg.package
      pkgs.coreutils
      pkgs.jq
    ];
    text = builtins.readFile ./declared-plugins.sh;
  };
in
{
  config = lib.mkIf cfg.enable {
    assertions = [
      (refuse (lib.filter (name: builtins.match names.pluginRule name == null) (
        lib.attrNames cfg.plugins
      )) (quoted: "cannot use as names of plugins: ${quoted}. A name must match ${names.pluginRule}."))
      (refuse (pluginsWhere (_: plugin: plugin.artifact == null || plugin.manifest == null)) (
        quoted: "cannot load the plugins ${quoted}: set package, or both artifact and manifest."
      ))
      (refuse (pluginsWhere (
        name: plugin: isValues plugin.manifest && plugin.manifest.name or name != name
      )) (quoted: "cannot load the plugins ${quoted}: their manifests have other names."))
      # What `grant` does not list is revoked.
      (refuse (pluginsWhere (name: _: cfg.settings.plugins ? grants.${name})) (
        quoted:
        "cannot grant capabilities to the plugins ${quoted} in settings.plugins.grants, since they are declared. Use"
        + " plugins.<name>.grant."
      ))
      (refuse (pluginsWhere (_: plugin: plugin.signature != null && isValues plugin.manifest)) (
        quoted:
        "cannot load the plugins ${quoted}: a signature is over a file. Give the manifest that was signed as one."
      ))
    ];

    warnings =
      lib.optional (cfg.settings.plugins.trust == "require" && cfg.trustedSigners == [ ])
        (
          "services.circleosd: settings.plugins.trust = \"require\" and trustedSigners is empty: every plugin is"
          + " refused whose signer does not stand in the file /etc/circleosd/trusted-signers, kept by hand."
        );

    systemd.services.circleosd-declared-plugins = {
      description = "Plugins declared in the NixOS configuration of CircleOSD";
      wantedBy = [ "multi-user.target" ];
      wants = map (daemon: "${daemon}.socket") names.daemons;
      after = map (daemon: "${daemon}.socket") names.daemons;
      restartTriggers = map (file: config.environment.etc.${file}.source) (
        [ "circleosd/config.toml" ] ++ lib.optional (cfg.trustedSigners != [ ]) "circleosd/trusted-signers"
      );
      # If nothing is declared, there is work only if something was declared before.
      unitConfig = lib.optionalAttrs (cfg.plugins == { }) {
        ConditionPathExists = "/var/lib/circleosd-declared-plugins/names";
      };
      environment.HOME = "%S/circleosd-declared-plugins";
      serviceConfig = {
        Type = "oneshot";
        RemainAfterExit = true;
        ExecStart = toString ([ (lib.getExe load) ] ++ lib.mapAttrsToList bundle cfg.plugins);
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
}
