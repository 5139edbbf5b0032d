# The full-stack scenario in a virtual machine. The machine that tests/systemd boots for the same file offers the
# same users, units and directory.
{ pkgs, self }:
pkgs.testers.runNixOSTest {
  name = "circleosd";

  defaults.documentation.nixos.options.warningsAreErrors = true;

  nodes.machine =
    { lib, pkgs, ... }:
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
      # The scenario starts them.
      systemd.services.nginx.wantedBy = lib.mkForce [ ];
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
      environment.etc."circleosd-test/plugins".source = ../plugins;
    };

  # The driver's type check knows only its own prelude; `make lint` checks the scenario.
  skipTypeCheck = true;
  testScript = builtins.readFile ./scenario.py;
}
