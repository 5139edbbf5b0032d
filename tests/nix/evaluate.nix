# Evaluates the NixOS module with nixpkgs' own module system and types. What the module sets elsewhere goes into
# options that take anything. `configuration` is a module; the result has `config` and `options`.
{ lib }:
configuration:
let
  inherit (lib) mkOption types;
  anything =
    default:
    mkOption {
      type = types.anything;
      inherit default;
    };
  list = mkOption {
    type = types.listOf types.anything;
    default = [ ];
  };
  attributes = types.attrsOf types.anything;
in
lib.evalModules {
  specialArgs.pkgs = import ./pkgs.nix { inherit lib; };
  modules = [
    ../../units/nixos-module.nix
    configuration
    (
      { config, ... }:
      {
        options = {
          assertions = list;
          warnings = list;
          environment.systemPackages = list;
          environment.etc = mkOption {
            default = { };
            type = types.attrsOf (
              types.submodule (
                { config, name, ... }:
                {
                  options.text = mkOption {
                    type = types.nullOr types.lines;
                    default = null;
                  };
                  options.source = anything "/made/${name}";
                }
              )
            );
          };
          security.polkit.enable = lib.mkEnableOption "polkit";
          systemd = {
            package = anything "/made/systemd";
            packages = list;
            tmpfiles.packages = list;
            paths = anything { };
            services = anything { };
            sockets = anything { };
            targets = anything { };
          };
          users.groups = mkOption {
            default = { };
            type = types.attrsOf (
              types.submodule (
                { name, ... }:
                {
                  options.members = mkOption {
                    type = types.listOf types.str;
                    default = [ ];
                  };
                  config.members = map (user: user.name) (
                    lib.filter (user: lib.elem name user.extraGroups) (lib.attrValues config.users.users)
                  );
                }
              )
            );
          };
          users.users = mkOption {
            default = { };
            type = types.attrsOf (
              types.submodule (
                { name, ... }:
                {
                  freeformType = attributes;
                  options.name = mkOption {
                    type = types.str;
                    default = name;
                  };
                  options.group = mkOption {
                    type = types.str;
                    default = "";
                  };
                  options.extraGroups = mkOption {
                    type = types.listOf types.str;
                    default = [ ];
                  };
                }
              )
            );
          };
        };
      }
    )
  ];
}
