# An assertion that holds if there are no offenders. `explain` turns their quoted names into a sentence.
lib: offenders: explain: {
  assertion = offenders == [ ];
  message = "services.circleosd: ${
    explain (lib.concatMapStringsSep ", " (name: "`${name}`") offenders)
  }";
}
