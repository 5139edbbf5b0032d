# What the NixOS module promises: an attribute set from the name of a promise to whether it is kept.
{ lib }:
let
  evaluation = import ./evaluate.nix { inherit lib; };
  evaluate = configuration: (evaluation configuration).config;
  enabled =
    options:
    evaluate {
      services.circleosd = {
        enable = true;
      }
      // options;
    };
  failures =
    configuration: map (a: a.message) (lib.filter (a: !a.assertion) configuration.assertions);

  # Everything of a configuration that a wrong value could reach.
  force =
    configuration:
    builtins.deepSeq [
      configuration.services.circleosd
      configuration.environment.etc
    ] true;
  accepted = options: failures (enabled options) == [ ] && force (enabled options);
  refusedByType = options: !(builtins.tryEval (force (enabled options))).success;
  refusedBecause =
    reason: options:
    let
      messages = failures (enabled options);
    in
    lib.length messages == 1 && lib.hasInfix reason (lib.head messages);

  file = name: builtins.toFile name "";
  plugin = {
    artifact = file "reverse.wasm";
    manifest = file "reverse.json";
  };
  key = "ops@example.org namespaces=\"circleosd-plugin\" ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIHOVMfs5L3eb5QE1pBcJ ops";

  plain = enabled { };
  full = enabled {
    services.nginx = {
      description = "web";
      verbs = [ "restart" ];
    };
    services.database.unit = "postgresql.service";
    plugins.reverse = plugin // {
      grant = [ "kv" ];
      sha256 = lib.concatStrings (lib.genList (_: "a") 64);
    };
    plugins.counter.artifact = file "counter.so";
    plugins.counter.manifest.version = "1";
    settings.plugins.trust = "warn";
    settings.plugins.time = 10;
    settings.registry.unit_timeout = 20;
    trustedSigners = [ key ];
  };
  wheel = evaluate {
    services.circleosd = {
      enable = true;
      adminGroup = "wheel";
    };
    users.groups.wheel.members = [
      "alice"
      "dave"
    ];
    users.users.alice.extraGroups = [ "wheel" ];
    users.users.bob.group = "wheel";
    users.users.carol.extraGroups = [ "users" ];
    users.users.erin = {
      enable = false;
      group = "wheel";
    };
  };
  pkgs = import ./pkgs.nix { inherit lib; };
  # A system whose programs the machine that builds it cannot run.
  cross =
    (import ./evaluate.nix {
      inherit lib;
      pkgs = pkgs // {
        stdenv = pkgs.stdenv // {
          buildPlatform.canExecute = _: false;
        };
        buildPackages.circleosd = pkgs.circleosd // {
          outPath = "/made/on-the-builder";
        };
      };
    } { services.circleosd.enable = true; }).config;
  settingsOf =
    configuration: configuration.environment.etc."circleosd/config.toml".source.environment.settings;
  start = full.systemd.services.circleosd-declared-plugins.serviceConfig.ExecStart;
in
{
  "a system without it gets nothing of it" =
    let
      off = evaluate { };
    in
    off.systemd.packages == [ ]
    && off.environment.etc == { }
    && off.users.users == { }
    && off.systemd.services == { }
    && off.systemd.user.services == { }
    && !off.security.polkit.enable;
  "enabling it is enough" = accepted { };
  "NixOS has every option that is set, for such values" =
    let
      set = configuration: {
        inherit (configuration) environment systemd users;
      };
    in
    builtins.deepSeq (map set [
      plain
      full
      wheel
    ]) true;
  "declared plugins are loaded at boot, once the sockets listen" =
    let
      service = plain.systemd.services.circleosd-declared-plugins;
    in
    service.wantedBy == [ "multi-user.target" ]
    && service.wants == service.after
    && lib.elem "circleosd-plugins.socket" service.after;
  "the package's units, directories, rules of the bus and programs are the system's" =
    let
      package = [ plain.services.circleosd.package ];
    in
    plain.systemd.packages == package
    && plain.systemd.tmpfiles.packages == package
    && plain.services.dbus.packages == package
    && plain.environment.systemPackages == package
    && plain.environment.etc."circleosd/config.toml".source.environment.nativeBuildInputs == package;
  "the users of the services are no people" = lib.all (user: user.isSystemUser) (
    lib.attrValues plain.users.users
  );
  "the target is wanted at boot" =
    plain.systemd.targets.circleosd.wantedBy == [ "multi-user.target" ];
  "every option is described" =
    let
      documented = lib.filter (option: lib.hasPrefix "services.circleosd." option.name) (
        lib.optionAttrSetToDocList (evaluation { }).options
      );
    in
    lib.length documented > 15
    && lib.all (option: option.description != null && lib.isString option.type) documented;
  "the sockets are wanted by sockets.target" = lib.all (
    socket: lib.elem "sockets.target" socket.wantedBy
  ) (lib.attrValues plain.systemd.sockets);
  "the polkit rule is made from the catalog" =
    let
      rule = plain.environment.etc."polkit-1/rules.d/49-circleosd.rules".source;
    in
    plain.security.polkit.enable
    && lib.hasInfix "cp /made/circleosd-services.toml " rule.script
    && rule.environment.nativeBuildInputs == [ plain.services.circleosd.package ]
    && lib.elem rule plain.systemd.services.polkit.restartTriggers;
  "what runs while a system is built can run there" =
    let
      run = file: map toString cross.environment.etc.${file}.source.environment.nativeBuildInputs;
    in
    run "circleosd/config.toml" == [ "/made/on-the-builder" ]
    && run "polkit-1/rules.d/49-circleosd.rules" == [ "/made/on-the-builder" ]
    && map toString cross.systemd.packages == [ "/made/circleosd" ];
  "a change of what a service reads restarts it" =
    plain.systemd.services.circleosd-auth.restartTriggers != [ ]
    &&
      lib.elem full.environment.etc."circleosd/services.d/nixos.toml".source
        full.systemd.services.circleosd-registry.restartTriggers
    &&
      lib.elem full.environment.etc."circleosd/trusted-signers".source
        full.systemd.services.circleosd-declared-plugins.restartTriggers;
  "a switch starts no worker that nobody connects to" =
    !plain.systemd.services."circleosd-plugin@".restartIfChanged
    && !plain.systemd.user.services."circleosd-plugin@".restartIfChanged;
  "sockets keep listening while a switch restarts their services" = lib.all (
    daemon:
    !plain.systemd.services.${daemon}.stopIfChanged
    && !plain.systemd.user.services.${daemon}.stopIfChanged
  ) (import ../../units/nixos/names.nix).daemons;
  "the journal's catalog is put where journalctl looks for it" =
    let
      service = plain.systemd.services.circleosd-journal-catalog;
    in
    service.wantedBy == [ "multi-user.target" ]
    && service.serviceConfig.Type == "oneshot"
    && service.serviceConfig.RemainAfterExit
    &&
      service.serviceConfig.ExecStart == [
        (
          "/made/coreutils/bin/install -D -m 444 -t /usr/local/lib/systemd/catalog"
          + " /made/circleosd/lib/systemd/catalog/circleosd.catalog"
        )
        "/made/systemd/bin/journalctl --update-catalog"
      ];
  "the journal's catalog goes with the module" =
    plain.systemd.services.circleosd-journal-catalog.serviceConfig.ExecStop
    == "/made/coreutils/bin/rm -f /usr/local/lib/systemd/catalog/circleosd.catalog";
  "the directory of the sockets goes with the module, after them, and not by another switch" =
    let
      service = plain.systemd.services.circleosd-runtime-directory;
    in
    service.wantedBy == [ "multi-user.target" ]
    && service.before == map (name: "${name}.socket") (lib.attrNames plain.systemd.sockets)
    && !service.restartIfChanged
    && !service.unitConfig.DefaultDependencies
    &&
      service.preStop
      == ''[ "$(systemctl is-active circleosd-auth.socket)" != inactive ] || rm -rf /run/circleosd'';
  "declared services become the catalog" =
    full.environment.etc."circleosd/services.d/nixos.toml".source.value.service == [
      {
        name = "database";
        unit = "postgresql.service";
        description = "";
        verbs = [
          "start"
          "stop"
          "restart"
        ];
      }
      {
        name = "nginx";
        unit = "nginx.service";
        description = "web";
        verbs = [ "restart" ];
      }
    ];
  "settings keep what has no option of its own" =
    (settingsOf full).value == {
      plugins.time = 10;
      plugins.trust = "warn";
      registry.unit_timeout = 20;
    };
  "signatures are required once there are signers" =
    (settingsOf plain).value == {
      plugins = { };
    }
    && (enabled { trustedSigners = [ key ]; }).services.circleosd.settings.plugins.trust == "require";
  "without declared signers the file is the administrator's" =
    !plain.environment.etc ? "circleosd/trusted-signers";
  "signers are listed one a line" =
    full.environment.etc."circleosd/trusted-signers".text == key + "\n"
    &&
      (enabled {
        trustedSigners = [
          (key + "\n")
          key
        ];
      }).environment.etc."circleosd/trusted-signers".text == key + "\n" + key + "\n"
    &&
      (enabled { trustedSigners = "/signers"; }).environment.etc."circleosd/trusted-signers".source
      == "/signers";
  "the services go by files of root's, whoever owns the store" =
    let
      mode = trustedSigners: name: (enabled { inherit trustedSigners; }).environment.etc.${name}.mode;
    in
    lib.all (name: mode [ key ] "circleosd/${name}" == "0444") [
      "config.toml"
      "services.d/nixos.toml"
      "trusted-signers"
    ]
    && mode ./cases.nix "circleosd/trusted-signers" == "0444";
  "signers can change without a switch in a file that is not in the store" =
    (enabled { trustedSigners = "/signers"; }).environment.etc."circleosd/trusted-signers".mode
    == "symlink";
  "every declared plugin is handed over" =
    failures full == [ ]
    && lib.hasSuffix " /made/circleosd-plugin-counter /made/circleosd-plugin-reverse" start;
  "plugins are unloaded when none is declared anymore" =
    let
      service = plain.systemd.services.circleosd-declared-plugins;
    in
    lib.hasPrefix "/var/lib/${service.serviceConfig.StateDirectory}/" service.unitConfig.ConditionPathExists
    && !(full.systemd.services.circleosd-declared-plugins.unitConfig ? ConditionPathExists);
  "members of another admin group may connect" =
    lib.naturalSort wheel.users.groups.circleosd.members == [
      "alice"
      "bob"
      "dave"
    ];
  "an admin group that is nowhere is refused" = refusedBecause "does not have it" {
    adminGroup = "whele";
  };
  "its own users are in no group but their own" = lib.all (
    daemon:
    wheel.users.users.${daemon}.group == daemon && wheel.users.users.${daemon}.extraGroups == [ ]
  ) (import ../../units/nixos/names.nix).daemons;

  "escaped and instantiated units are taken" =
    accepted { services.a.unit = "srv-my\\x2ddata.mount"; }
    && accepted { services.a.unit = "getty@tty1.service"; };
  "a unit without suffix is refused" = refusedByType { services.a.unit = "nginx"; };
  "a unit with a foreign suffix is refused" = refusedByType { services.a.unit = "nginx.conf"; };
  "a unit that cannot be started is refused" = refusedByType { services.a.unit = "dev-sda.device"; };
  "a template without an instance is refused" = refusedByType { services.a.unit = "getty@.service"; };
  "an overlong unit is refused" = refusedByType {
    services.a.unit = lib.concatStrings (lib.genList (_: "a") 248) + ".service";
  };
  "a path for a unit is refused" = refusedByType { services.a.unit = "/etc/passwd.service"; };
  "a verb that polkit cannot confine is refused" = refusedByType { services.a.verbs = [ "enable" ]; };
  "a service without verbs is refused" = refusedByType { services.a.verbs = [ ]; };
  "an unknown option of a service is refused" = refusedByType { services.a.units = "a.service"; };
  "a short digest is refused" = refusedByType {
    plugins.reverse = plugin // {
      sha256 = "abc";
    };
  };
  "a digest in capitals is refused" = refusedByType {
    plugins.reverse = plugin // {
      sha256 = lib.concatStrings (lib.genList (_: "A") 64);
    };
  };
  "only capabilities that there are can be granted" =
    let
      granting =
        capability:
        force (enabled {
          plugins.reverse = plugin // {
            grant = [ capability ];
          };
        });
      refused = capability: !(builtins.tryEval (granting capability)).success;
    in
    lib.all granting [
      "all"
      "services:restart:*"
      "services:restart:site:web"
    ]
    && lib.all refused [
      "kvv"
      "kv; rm"
      "services:restart:"
      "events:a:b"
    ];
  "an unknown trust policy is refused" = refusedByType { settings.plugins.trust = "maybe"; };
  "a signer that is no key is refused" = refusedByType { trustedSigners = [ "ops@example.org" ]; };
  "two signers in one line are refused" = refusedByType { trustedSigners = [ (key + "\n" + key) ]; };
  "an impossible group is refused" = refusedByType { adminGroup = "no such"; };

  "a service's name follows the rule" =
    accepted {
      services.Nginx.unit = "a.service";
      services."getty@tty1" = { };
      services."site:web".unit = "b.service";
    }
    && refusedBecause "names of services: `a b`" { services."a b".unit = "a.service"; };
  "a service's name has at most 128 characters" =
    accepted { services.${lib.concatStrings (lib.genList (_: "a") 128)} = { }; }
    && refusedBecause "names of services" {
      services.${lib.concatStrings (lib.genList (_: "a") 129)} = { };
    };
  "a plugin's name follows the rule" = refusedBecause "names of plugins: `a b`" {
    plugins."a b" = plugin;
  };
  "CircleOSD's own names are taken" =
    refusedBecause "CircleOSD's own" { services.auth-service = { }; }
    && refusedBecause "CircleOSD's own" { services."plugin@a".unit = "a.service"; };
  "CircleOSD's own units are in the catalog by themselves" =
    refusedBecause "`circleosd-auth.service`" { services.a.unit = "circleosd-auth.service"; }
    && refusedBecause "`circleosd-plugin@a.service`" {
      services.a.unit = "circleosd-plugin@a.service";
    };
  "a unit has one name" = refusedBecause "`nginx.service` under more than one name" {
    services.nginx = { };
    services.web.unit = "nginx.service";
  };
  "a plugin needs artifact and manifest" = refusedBecause "set package, or both" {
    plugins.reverse.artifact = file "reverse.wasm";
  };
  "a plugin's files can be read when the system is built" =
    let
      outside =
        name:
        refusedByType {
          plugins.reverse = plugin // {
            ${name} = "/var/lib/plugins/reverse";
          };
        };
    in
    lib.all outside [
      "artifact"
      "manifest"
      "signature"
    ]
    && accepted {
      plugins.reverse.artifact = ../../plugins/examples/reverse/reverse.wasm;
      plugins.reverse.manifest = ../../plugins/examples/reverse/reverse.json;
    }
    && accepted {
      plugins.reverse.package = derivation {
        name = "reverse";
        system = "any";
        builder = "/bin/sh";
      };
    };
  "a plugin's manifest has its name" = refusedBecause "other names" {
    plugins.reverse = plugin // {
      manifest.name = "other";
    };
  };
  "without declared signers, required ones are said to be the administrator's" =
    accepted { settings.plugins.trust = "require"; }
    && lib.any (lib.hasInfix "/etc/circleosd/trusted-signers") (
      (enabled { settings.plugins.trust = "require"; }).warnings
    )
    && plain.warnings == [ ]
    && (enabled { trustedSigners = [ key ]; }).warnings == [ ];
  "the build of a plugin knows what is required of it, and what it is granted" =
    let
      signature = file "reverse.json.sig";
      sha256 = lib.concatStrings (lib.genList (_: "a") 64);
      told =
        (import ./evaluate.nix {
          inherit lib;
          pkgs = pkgs // {
            runCommand = _: environment: _: {
              type = "derivation";
              outPath =
                "/"
                + lib.concatMapStringsSep "," (name: environment.${name} or "") [
                  "trust"
                  "extension"
                  "signature"
                  "expected"
                  "grants"
                ];
            };
          };
        } {
          services.circleosd = {
            enable = true;
            plugins.counter.artifact = file "counter.so";
            plugins.counter.manifest.version = "1";
            plugins.reverse = plugin // {
              inherit signature sha256;
              grant = [ "kv" ];
            };
            settings.plugins.trust = "require";
          };
        }).config;
    in
    lib.hasSuffix " /require,so,,, /require,wasm,${signature},${sha256},kv\n"
      told.systemd.services.circleosd-declared-plugins.serviceConfig.ExecStart;
  "a declared plugin has its grants in one place" =
    refusedBecause "in settings.plugins.grants" {
      plugins.reverse = plugin;
      settings.plugins.grants.reverse = [ "kv" ];
    }
    && accepted {
      plugins.reverse = plugin;
      settings.plugins.grants.counter = [ "kv" ];
    };
  "a signature is over a file" = refusedBecause "a signature is over a file" {
    plugins.reverse = plugin // {
      manifest.version = "1";
      signature = file "reverse.json.sig";
    };
  };
}
