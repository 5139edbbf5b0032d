# The full-stack scenario in a virtual machine. The machine that tests/systemd boots for the same file offers the
# same users, units and directory.
{ pkgs, self }:
pkgs.testers.runNixOSTest {
  name = "circleosd";

  nodes.machine =
    {
      config,
      lib,
      pkgs,
      ...
    }:
    let
      hostile = pkgs.runCommandCC "circleosd-hostile-plugins" { nativeBuildInputs = [ pkgs.wabt ]; } ''
        mkdir -p $out tree/nixos-test tree/plugins
        cp -r ${./plugins} tree/nixos-test/plugins
        cp -r ${../plugins/include} tree/plugins/include
        make -C tree/nixos-test/plugins OUT=$out WAT2WASM=wat2wasm WAT2WASM_OUT=-o
      '';
    in
    {
      imports = [ self.nixosModules.default ];

      virtualisation = {
        cores = 2;
        memorySize = 2048;
      };

      services.circleosd = {
        enable = true;
        settings.server.idle_exit = 3;
        services = {
          nginx = {
            description = "A web server";
            verbs = [
              "start"
              "stop"
              "restart"
              "reload"
            ];
          };
          broken.description = "A service that cannot start";
        };
      };

      services.nginx = {
        enable = true;
        virtualHosts.localhost.locations."/".return = "200 hello";
      };
      # The scenario starts it, as often as NixOS allows within a minute, and fails it for good.
      systemd.services.nginx = {
        wantedBy = lib.mkForce [ ];
        startLimitIntervalSec = lib.mkForce 0;
        serviceConfig.Restart = lib.mkForce "no";
      };
      systemd.services.broken = {
        script = "echo 'cannot start: this service is broken' >&2; exit 3";
        serviceConfig.Type = "oneshot";
      };

      users.users = {
        alice = {
          isNormalUser = true;
          uid = 1000;
          extraGroups = [ "circleosd" ];
        };
        bob = {
          isNormalUser = true;
          uid = 1001;
          extraGroups = [ "circleosd" ];
        };
        mallory = {
          isNormalUser = true;
          uid = 1002;
        };
      };

      environment.systemPackages = [ pkgs.socat ];
      environment.etc."circleosd-test/plugins".source =
        "${config.services.circleosd.package}/share/circleosd/plugins";
      environment.etc."circleosd-test/hostile".source = hostile;
    };

  testScript = builtins.readFile ./scenario.py;
}
