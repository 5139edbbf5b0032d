# The NixOS module: services.circleosd. Its options are in nixos/options.nix.
{
  config,
  lib,
  pkgs,
  ...
}:
let
  cfg = config.services.circleosd;
  names = import ./nixos/names.nix;
  toml = pkgs.formats.toml { };

  # What runs while the system is built, perhaps on a machine that cannot run the system's programs.
  buildPackage =
    if pkgs.stdenv.buildPlatform.canExecute pkgs.stdenv.hostPlatform then
      cfg.package
    else
      pkgs.buildPackages.circleosd or (pkgs.buildPackages.callPackage ./package.nix { });

  # A service does not start with a wrong setting, so do not build a system with one.
  configFile =
    pkgs.runCommand "circleosd.toml"
      {
        nativeBuildInputs = [ buildPackage ];
        settings = toml.generate "circleosd.toml" (
          lib.filterAttrsRecursive (_: value: value != null) cfg.settings
        );
      }
      ''
        cp $settings config.toml
        CIRCLEOSD_CONFIG_DIR=$PWD circleosd check-settings
        cp config.toml $out
      '';

  catalog = toml.generate "circleosd-services.toml" {
    service = lib.mapAttrsToList (name: service: {
      inherit name;
      inherit (service) unit description verbs;
    }) cfg.services;
  };

  # On other systems, circleosd-polkit.service does this.
  polkitRule = pkgs.runCommand "circleosd.rules" { nativeBuildInputs = [ buildPackage ]; } ''
    mkdir services.d
    cp ${catalog} services.d/nixos.toml
    circleosd polkit-rule services.d >$out
  '';

  # The system's services go by nothing but files of root's. In a virtual machine that shares the store of its host, the
  # store is nobody's, so that links to it do not count.
  copied.mode = "0444";

  # For NixOS, a group's members are users with the group in extraGroups, but not those whose primary group it is.
  primaryUsers = lib.filter (user: user.enable && user.group == cfg.adminGroup) (
    lib.attrValues config.users.users
  );
  admins = config.users.groups.${cfg.adminGroup}.members ++ map (user: user.name) primaryUsers;

  # When a switch restarts a service, of the system or of a user, its socket keeps listening. A switch must not start
  # workers: a worker without a connection does not end, and only the plugin manager connects to it.
  onSwitch =
    lib.genAttrs names.daemons (_: {
      stopIfChanged = false;
    })
    // {
      "circleosd-plugin@".restartIfChanged = false;
    };

  refuse = import ./nixos/refuse.nix lib;
  services = lib.attrNames cfg.services;
  units = lib.mapAttrsToList (_: service: service.unit) cfg.services;
in
{
  imports = [
    ./nixos/options.nix
    ./nixos/plugins.nix
  ];

  config = lib.mkIf cfg.enable {
    assertions = [
      (refuse (lib.filter (name: builtins.match names.serviceRule name == null) services) (
        quoted: "cannot use as names of services: ${quoted}. A name must match ${names.serviceRule}."
      ))
      (refuse
        (lib.filter (
          name: lib.elem name names.ownServices || lib.hasPrefix names.workerPrefix name
        ) services)
        (quoted: "cannot declare services named ${quoted}: these are CircleOSD's own.")
      )
      (refuse
        (lib.filter (unit: lib.elem unit names.ownUnits || lib.hasPrefix "circleosd-plugin@" unit) units)
        (
          quoted:
          "cannot declare the units ${quoted}: CircleOSD's own units are in the catalog by themselves."
        )
      )
      (refuse (lib.unique (lib.filter (unit: lib.count (other: other == unit) units > 1) units)) (
        quoted: "cannot declare the units ${quoted} under more than one name. Keep one name for each."
      ))
      (refuse (lib.optional (!config.users.groups ? ${cfg.adminGroup}) cfg.adminGroup) (
        quoted: "cannot use ${quoted} as adminGroup: users.groups does not have it."
      ))
    ];

    users.groups = lib.genAttrs names.daemons (_: { }) // {
      ${names.socketGroup}.members = lib.optionals (cfg.adminGroup != names.socketGroup) (
        lib.unique admins
      );
    };

    # The groups that a service needs besides its own are in its unit.
    users.users = lib.genAttrs names.daemons (daemon: {
      isSystemUser = true;
      group = daemon;
      description = "CircleOSD (${lib.removePrefix "circleosd-" daemon})";
    });

    environment.systemPackages = [ cfg.package ];

    environment.etc = {
      "circleosd/config.toml" = copied // { source = configFile; };
      "circleosd/services.d/nixos.toml" = copied // { source = catalog; };
      "polkit-1/rules.d/49-circleosd.rules".source = polkitRule;
    }
    # If no signers are declared, an administrator may manage the file.
    // lib.optionalAttrs (cfg.trustedSigners != [ ]) {
      "circleosd/trusted-signers" =
        if lib.isList cfg.trustedSigners then
          copied
          // {
            # A key read from its file ends in a newline.
            text = lib.concatMapStrings (line: lib.removeSuffix "\n" line + "\n") cfg.trustedSigners;
          }
        else
          # A file outside of the store can be changed without a switch.
          { source = cfg.trustedSigners; }
          // lib.optionalAttrs (lib.hasPrefix builtins.storeDir "${cfg.trustedSigners}") copied;
    };

    security.polkit.enable = true;
    services.dbus.packages = [ cfg.package ];

    systemd.packages = [ cfg.package ];
    systemd.tmpfiles.packages = [ cfg.package ];

    # NixOS does not read [Install] sections.
    systemd.targets.circleosd.wantedBy = [ "multi-user.target" ];
    systemd.sockets = lib.genAttrs names.daemons (_: {
      wantedBy = [ "sockets.target" ];
    });

    systemd.user.services = onSwitch;
    systemd.services = lib.mkMerge [
      onSwitch
      (lib.genAttrs names.daemons (daemon: {
        restartTriggers = [ configFile ] ++ lib.optional (daemon == "circleosd-registry") catalog;
      }))
      {
        polkit.restartTriggers = [ polkitRule ];
        # journalctl reads this directory and systemd's own, which is in the Nix store. It is a copy because a link would
        # dangle if it outlived the module, after a crash say, and fail every later update.
        circleosd-journal-catalog = {
          description = "Entries of CircleOSD in the journal's catalog";
          wantedBy = [ "multi-user.target" ];
          serviceConfig = {
            Type = "oneshot";
            RemainAfterExit = true;
            ExecStart = [
              "${pkgs.coreutils}/bin/install -D -m 444 -t /usr/local/lib/systemd/catalog ${cfg.package}/lib/systemd/catalog/circleosd.catalog"
              "${config.systemd.package}/bin/journalctl --update-catalog"
            ];
            ExecStop = "${pkgs.coreutils}/bin/rm -f /usr/local/lib/systemd/catalog/circleosd.catalog";
          };
        };
        # To circlectl, this directory means that the system runs CircleOSD, and systemd leaves the files of stopped sockets
        # there. A switch that drops the module stops this service after the sockets; one to a module that lacks it stops
        # it alone.
        circleosd-runtime-directory = {
          description = "Directory of CircleOSD's sockets";
          wantedBy = [ "multi-user.target" ];
          before = map (daemon: "${daemon}.socket") names.daemons;
          restartIfChanged = false;
          unitConfig.DefaultDependencies = false; # the sockets start before what has them
          serviceConfig.Type = "oneshot";
          serviceConfig.RemainAfterExit = true;
          preStop = ''[ "$(systemctl is-active circleosd-auth.socket)" != inactive ] || rm -rf /run/circleosd'';
        };
      }
    ];
  };
}
