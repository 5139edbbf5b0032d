{
  lib,
  openssh,
  python3Packages,
  withTests ? false,
}:
let
  inherit (lib) fileset;

  without = extension: fileset.fileFilter (file: !file.hasExt extension);

  dependencies = with python3Packages; [
    argon2-cffi
    dbus-fast
    fire
    pydantic
    sdnotify
    # Releases before 25.11 know it by the module's name.
    (python3Packages.systemd-python or systemd)
    wasmtime
  ];
in
python3Packages.buildPythonApplication {
  pname = "circleosd";
  inherit ((lib.importTOML ../pyproject.toml).project) version;
  pyproject = true;

  # The tests read the whole tree; a build without them depends on nothing but the application.
  src =
    if withTests then
      lib.cleanSource ../.
    else
      fileset.toSource {
        root = ../.;
        fileset = fileset.unions [
          ../pyproject.toml
          ../README.md
          (without "pyc" ../circlectl)
          (without "pyc" ../circleosd)
          (without "nix" ./.)
        ];
      };

  build-system = [ python3Packages.hatchling ];
  inherit dependencies;

  # ssh-keygen signs and verifies plugins. sys.prefix is Python's own directory here: `circleosd up` finds the services
  # on PATH and their units on CIRCLEOSD_UNIT_PATH, and a child started by `sys.executable -m`, which is not wrapped,
  # its modules on PYTHONPATH.
  makeWrapperArgs = [
    "--prefix"
    "PATH"
    ":"
    "${placeholder "out"}/bin:${lib.makeBinPath [ openssh ]}"
    "--prefix"
    "PYTHONPATH"
    ":"
    "${placeholder "out"}/${python3Packages.python.sitePackages}:${python3Packages.makePythonPath dependencies}"
    "--suffix"
    "CIRCLEOSD_UNIT_PATH"
    ":"
    "${placeholder "out"}/share/circleosd/units"
  ];

  # NixOS takes units and their drop-ins from lib/systemd. The polkit generator serves the system manager only.
  postInstall = ''
    system=$out/lib/systemd/system user=$out/lib/systemd/user
    install -Dm444 -t "$system" units/*.{target,socket,service,path}
    for dropins in units/system/*.d; do
      install -Dm444 -t "$system/''${dropins##*/}" "$dropins"/*.conf
    done
    install -Dm444 -t "$user" units/*.{target,socket,service}
    rm -f "$user"/circleosd-polkit.*

    find "$system" "$user" -type f -exec \
      sed -i -E "s#^(Exec[A-Za-z]+=[-@:+!]*)circleosd( |\$)#\1$out/bin/circleosd\2#" {} +
    if grep -rE '^Exec(Start|Stop|Reload|Condition)[A-Za-z]*=[-@:+!]*[^-@:+!/]' "$system" "$user"; then
      echo "cannot install the units: the commands above have no absolute path" >&2
      exit 1
    fi

    install -Dm444 units/circleosd.sysusers.conf $out/lib/sysusers.d/circleosd.conf
    install -Dm444 units/circleosd.tmpfiles.conf $out/lib/tmpfiles.d/circleosd.conf
    install -Dm444 units/circleosd.catalog $out/lib/systemd/catalog/circleosd.catalog
  '';

  pythonImportsCheck = [
    "circlectl"
    "circleosd"
  ];

  doCheck = withTests;
  nativeCheckInputs = [
    openssh
    python3Packages.pytest
    python3Packages.pytest-timeout
  ];
  checkPhase = ''
    runHook preCheck
    HOME=$(mktemp -d) python -m pytest -p no:cacheprovider tests/unit
    runHook postCheck
  '';

  meta = {
    description = "Limited, accountable control over a Linux host, without handing out sudo";
    mainProgram = "circlectl";
    platforms = lib.platforms.linux;
  };
}
