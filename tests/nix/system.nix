# The configuration of a NixOS system with all that the module offers, over NixOS's own modules.
{ nixpkgs }:
let
  reverse = ../../plugins/examples/reverse;
  system = import (nixpkgs + "/nixos/lib/eval-config.nix") {
    system = "x86_64-linux";
    modules = [
      ../../units/nixos-module.nix
      (
        { lib, ... }:
        {
          # Without file systems and a boot loader.
          boot.isContainer = true;
          system.stateVersion = lib.trivial.release;
          users.users.alice = {
            isNormalUser = true;
            extraGroups = [ "wheel" ];
          };
          services.circleosd = {
            enable = true;
            adminGroup = "wheel";
            services.db.unit = "postgresql.service";
            settings.plugins.trust = "warn";
            settings.server.idle_exit = 60;
            trustedSigners = builtins.toFile "signers" "";
            plugins.reverse = {
              artifact = reverse + "/reverse.wasm";
              manifest = reverse + "/reverse.json";
              grant = [ "kv" ];
            };
            plugins.counter = {
              artifact = ../../plugins/examples/counter/counter.wasm;
              manifest.version = "1.0.0";
            };
          };
        }
      )
    ];
  };
in
system.config
