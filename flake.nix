{
  description = "CircleOSD: limited, accountable control over a Linux host, without handing out sudo";

  inputs.nixpkgs.url = "github:NixOS/nixpkgs/nixos-unstable";

  outputs =
    { self, nixpkgs }:
    let
      inherit (nixpkgs) lib;

      # The services are systemd's, so there is nothing to build for other kernels.
      systems = [
        "x86_64-linux"
        "aarch64-linux"
      ];

      eachSystem = f: lib.genAttrs systems (system: f nixpkgs.legacyPackages.${system});
      packageFor = pkgs: self.packages.${pkgs.stdenv.hostPlatform.system}.default;
    in
    {
      packages = eachSystem (pkgs: {
        default = pkgs.callPackage ./units/package.nix { };
      });

      apps = eachSystem (pkgs: {
        default = {
          type = "app";
          program = lib.getExe (packageFor pkgs);
          meta.description = "The command line of CircleOSD";
        };
      });

      overlays.default = final: prev: {
        circleosd = final.callPackage ./units/package.nix { };
      };

      nixosModules.default = ./units/nixos-module.nix;

      devShells = eachSystem (pkgs: {
        default = pkgs.mkShell {
          inputsFrom = [ (packageFor pkgs) ];
          packages = [
            pkgs.openssh
            pkgs.python3Packages.hatchling
            pkgs.python3Packages.mypy
            pkgs.python3Packages.pytest
            pkgs.python3Packages.pytest-timeout
            pkgs.python3Packages.pytest-xdist
            pkgs.ruff
          ];
        };
      });

      formatter = eachSystem (pkgs: pkgs.nixfmt-tree);

      checks = eachSystem (pkgs: {
        package = packageFor pkgs;
        unit-tests = (packageFor pkgs).override { withTests = true; };
        module = import ./tests/nix/check.nix { inherit lib pkgs; };
        vm = import ./nixos-test { inherit pkgs self; };
      });
    };
}
