# An assertion that holds if there are no offenders. `explain` makes a sentence of their quoted names.
lib: offenders: explain: {
  assertion = offenders == [ ];
  message = "services.circleosd: ${
    explain (lib.concatMapStringsSep ", " (name: "`${name}`") offenders)
  }";
}
