{
  lib,
  installShellFiles,
  openssh,
  python3Packages,
  wabt,
  withTests ? false,
}:
let
  inherit (lib) fileset;

  without = extension: fileset.fileFilter (file: !file.hasExt extension);
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
          ../ARCHITECTURE.md
          ../CHANGELOG.md
          ../HACKING.md
          ../README.md
          ../SECURITY.md
          ../completions
          ../docs
          ../man
          ../plugins/ABI.md
          ../plugins/README.md
          ../plugins/example.json
          ../plugins/example.wat
          (without "so" ../plugins/examples)
          ../plugins/include
          ../plugins/wit
          ../pyproject.toml
          ../scripts/user-unit-files
          (without "pyc" ../circlectl)
          (without "pyc" ../circleosd)
          (fileset.difference (without "nix" ./.) ./nixos)
        ];
      };

  build-system = [ python3Packages.hatchling ];
  dependencies = with python3Packages; [
    argon2-cffi
    dbus-fast
    fire
    pydantic
    sdnotify
    # Releases before 25.11 call it by the module's name.
    (python3Packages.systemd-python or systemd)
    wasmtime
  ];
  nativeBuildInputs = [
    installShellFiles
    wabt
  ];

  # ssh-keygen signs and verifies plugins; `circleosd up` finds the services on PATH.
  makeWrapperArgs = [
    "--prefix"
    "PATH"
    ":"
    "${placeholder "out"}/bin:${lib.makeBinPath [ openssh ]}"
  ];

  # NixOS takes units and their drop-ins from lib/systemd. Units only for the system manager write the polkit rule and
  # enable units; on NixOS the configuration does both, and declares the users.
  postInstall = ''
    mapfile -t files < <(bash scripts/user-unit-files)
    for manager in system user; do
      install -Dm444 -t "$out/lib/systemd/$manager" "''${files[@]}"
      sed -i -E "s#^(Exec[A-Za-z]+=[-@:+!]*)circleosd( |\$)#\1$out/bin/circleosd\2#" "$out/lib/systemd/$manager"/*
    done
    # A user's manager has no multi-user.target, and would warn about that whenever the unit is enabled.
    sed -i 's/^WantedBy=multi-user.target /WantedBy=/' $out/lib/systemd/user/circleosd.target
    cp -r --no-preserve=mode units/system/*.d "$out/lib/systemd/system"
    if grep -rE '^Exec(Start|Stop|Reload|Condition)[A-Za-z]*=[-@:+!]*[^-@:+!/]' $out/lib/systemd; then
      echo "cannot install the units: the commands above have no absolute path" >&2
      exit 1
    fi
    install -Dm444 units/circleosd.tmpfiles.conf $out/lib/tmpfiles.d/circleosd.conf
    install -Dm444 units/circleosd.catalog $out/lib/systemd/catalog/circleosd.catalog
    install -Dm444 units/circleosd.dbus.conf $out/share/dbus-1/system.d/circleosd.conf

    for page in *.md docs/*.md plugins/*.md; do
      install -Dm444 "$page" "$out/share/doc/circleosd/$page"
    done
    install -Dm444 -t $out/share/circleosd/plugins plugins/example.{wat,json}
    wat2wasm --debug-names plugins/example.wat -o $out/share/circleosd/plugins/example.wasm
    cp -r --no-preserve=mode plugins/{examples,include,wit} $out/share/circleosd/plugins
    ln -s ../../../circleosd/plugins/{examples,include,wit} $out/share/doc/circleosd/plugins

    python -m circlectl.manual >circlectl.1
    sed "s#/usr/share/doc#$out/share/doc#" man/circleosd.8 >circleosd.8
    installManPage circlectl.1 circleosd.8 man/*.5
    installShellCompletion completions/circlectl.{bash,fish,zsh}
  '';

  # With them the libraries, for a release of one may lack a name that is used here.
  pythonImportsCheck = [
    "circlectl"
    "circleosd.systemd.bus"
    "circleosd.systemd.logs"
    "circleosd.systemd.notify"
    "circleosd.validation"
    "circleosd.worker.component"
    "circleosd.worker.wasi"
  ];

  doCheck = withTests;
  nativeCheckInputs = [
    openssh
    python3Packages.pytest
    python3Packages.pytest-timeout
  ];
  # The linters are in the development shell; test_nix.py would run Nix within Nix.
  checkPhase = ''
    runHook preCheck
    python plugins/wat2wasm.py plugins/example.wat plugins/example.wasm
    HOME=$(mktemp -d) python -m pytest -p no:cacheprovider tests/unit \
      --ignore=tests/unit/test_linters.py --ignore=tests/unit/test_nix.py
    runHook postCheck
  '';

  meta = {
    description = "Limited, accountable control over a Linux host, without handing out sudo";
    mainProgram = "circlectl";
    platforms = lib.platforms.linux;
  };
}
