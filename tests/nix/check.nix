# Fails with the names of the promises that the NixOS module does not keep.
{ lib, pkgs }:
let
  cases = import ./cases.nix { inherit lib; };
  broken = lib.attrNames (lib.filterAttrs (_: kept: !kept) cases);
in
pkgs.runCommand "circleosd-module" { } (
  if broken == [ ] then
    "echo ${toString (lib.length (lib.attrNames cases))} promises kept >$out"
  else
    throw "the NixOS module does not keep: ${lib.concatStringsSep "; " broken}"
)
