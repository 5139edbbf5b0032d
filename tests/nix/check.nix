# Fails with the names of the promises that the NixOS module does not keep, and when an option cannot be documented.
{ lib, pkgs }:
let
  cases = import ./cases.nix { inherit lib; };
  broken = lib.attrNames (lib.filterAttrs (_: kept: !kept) cases);
  inherit (import ./evaluate.nix { inherit lib; } { }) options;
  manual = pkgs.nixosOptionsDoc { options.services = { inherit (options.services) circleosd; }; };
in
pkgs.runCommand "circleosd-module" { } (
  if broken == [ ] then
    "ln -s ${manual.optionsCommonMark} $out"
  else
    throw "the NixOS module does not keep: ${lib.concatStringsSep "; " broken}"
)
