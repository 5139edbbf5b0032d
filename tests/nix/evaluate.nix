# Evaluates the NixOS module with nixpkgs' own module system and types. What the module sets elsewhere is declared here,
# no wider than in NixOS: an option that NixOS does not have, or a value that it does not take, is an error here too.
# `configuration` is a module; the result has `config` and `options`.
{
  lib,
  pkgs ? import ./pkgs.nix { inherit lib; },
}:
configuration:
let
  inherit (lib) mkOption types;
  list =
    type:
    mkOption {
      type = types.listOf type;
      default = [ ];
    };
  set =
    type:
    mkOption {
      type = types.attrsOf type;
      default = { };
    };
  text = mkOption {
    type = types.singleLineStr;
    default = "";
  };
  yes = mkOption {
    type = types.bool;
    default = true;
  };

  unit = types.strMatching "[a-zA-Z0-9@%:_.\\-]+[.](service|socket|target)";
  value = types.oneOf [
    types.bool
    types.int
    types.str
    types.package
  ];
  section = set (types.either value (types.listOf value));
  service = {
    environment = set types.str;
    preStop = text;
    restartIfChanged = yes;
    stopIfChanged = yes;
    serviceConfig = section;
  };
  units =
    more:
    set (
      types.submodule {
        options = {
          description = text;
          wantedBy = list unit;
          wants = list unit;
          after = list unit;
          before = list unit;
          unitConfig = section;
          restartTriggers = list types.raw;
        }
        // more;
      }
    );
in
lib.evalModules {
  specialArgs = { inherit pkgs; };
  modules = [
    ../../units/nixos-module.nix
    configuration
    (
      { config, ... }:
      {
        options = {
          assertions = list types.raw;
          warnings = list types.str;
          environment.systemPackages = list types.package;
          environment.etc = set (
            types.submodule (
              { config, name, ... }:
              {
                options.text = mkOption {
                  type = types.nullOr types.lines;
                  default = null;
                };
                options.source = mkOption {
                  type = types.path;
                  default = "/made/${name}";
                };
                options.mode = mkOption {
                  type = types.str;
                  default = "symlink";
                };
              }
            )
          );
          security.polkit.enable = lib.mkEnableOption "polkit";
          services.dbus.packages = list types.package;
          systemd = {
            package = mkOption {
              type = types.path;
              default = "/made/systemd";
            };
            packages = list types.package;
            tmpfiles.packages = list types.package;
            services = units service;
            user.services = units service;
            sockets = units { };
            targets = units { };
          };
          users.groups = set (
            types.submodule (
              { name, ... }:
              {
                options.members = list (types.passwdEntry types.str);
                config.members = map (user: user.name) (
                  lib.filter (user: user.enable && lib.elem name user.extraGroups) (
                    lib.attrValues config.users.users
                  )
                );
              }
            )
          );
          users.users = set (
            types.submodule (
              { name, ... }:
              {
                options = {
                  enable = yes;
                  name = mkOption {
                    type = types.passwdEntry types.str;
                    default = name;
                  };
                  description = mkOption {
                    type = types.passwdEntry types.str;
                    default = "";
                  };
                  isSystemUser = mkOption {
                    type = types.bool;
                    default = false;
                  };
                  group = text;
                  extraGroups = list types.str;
                };
              }
            )
          );
        };
      }
    )
  ];
}
