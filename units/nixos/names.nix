# Names and rules that the services use too: circleosd/api/plugins.py, circleosd/plugins/capabilities.py,
# circleosd/registry/catalog.py, units/.
rec {
  daemons = [
    "circleosd-auth"
    "circleosd-plugins"
    "circleosd-registry"
  ];

  # The group that the packaged sockets name.
  socketGroup = "circleosd";

  # The registry lists CircleOSD itself under these names, and plugins' workers under names that start like this.
  ownServices = [
    "auth-service"
    "plugin-manager"
    "service-registry"
  ];
  workerPrefix = "plugin@";
  ownUnits = builtins.concatMap (daemon: [
    "${daemon}.service"
    "${daemon}.socket"
  ]) daemons;

  serviceRule = "[a-zA-Z0-9][a-zA-Z0-9_.@:-]{0,127}";
  pluginRule = "[a-z0-9][a-z0-9_-]{0,47}";
  grantRule =
    "all|log|kv|config|clock|services:read|services:restart:(\\*|${serviceRule})"
    + "|events:(\\*|[a-zA-Z0-9][a-zA-Z0-9_.@-]{0,127})";

  unitRule = "[a-zA-Z0-9:_.\\-]+(@[a-zA-Z0-9:_.\\-]+)?\\.(service|socket|timer|path|target|mount|slice)";

  defaultVerbs = [
    "start"
    "stop"
    "restart"
  ];
  verbs = defaultVerbs ++ [ "reload" ];
  trustPolicies = [
    "require"
    "warn"
    "off"
  ];
}
