"""cloud-init's own NoCloud data source reads a seed directory; what it makes of it, as JSON.

    python3 cloud_init.py SEED_DIRECTORY WORK_DIRECTORY

Runs under the system's Python, with Debian's cloud-init on its path.
"""

import json
import sys
from pathlib import Path

from cloudinit import helpers, safeyaml, settings
from cloudinit import net as network
from cloudinit.distros import debian
from cloudinit.net import eni, netplan, network_state, networkd
from cloudinit.sources import DataSourceNoCloud

seed, work = Path(sys.argv[1]), Path(sys.argv[2])
paths = helpers.Paths({"cloud_dir": str(work / "cloud"), "run_dir": str(work / "run"), "templates_dir": str(work)})
(work / "cloud" / "seed").mkdir(parents=True)
(work / "run").mkdir()
(work / "cloud" / "seed" / "nocloud").symlink_to(seed)
config = {**settings.CFG_BUILTIN, "datasource": {"NoCloud": {"fs_label": None}}}
source = DataSourceNoCloud.DataSourceNoCloud(config, debian.Distro("debian", config, paths), paths)
assert source.get_data(), "cloud-init takes this for no seed"
state = network_state.parse_net_config_data(source.network_config)
renderers = {"networkd": networkd.Renderer(), "ifupdown": eni.Renderer(), "netplan": netplan.Renderer()}
rendered = {}
for name, renderer in renderers.items():
    target = work / name
    target.mkdir()
    renderer.render_network_state(state, target=str(target))
    rendered[name] = "".join(path.read_text() for path in sorted(target.rglob("*")) if path.is_file())
user_data = source.get_userdata_raw().decode()
print(
    json.dumps(
        {
            "instance": source.get_instance_id(),
            "host": source.get_hostname().hostname,
            "keys": source.get_public_ssh_keys(),
            "renames": network.extract_physdevs(source.network_config),
            "user data": user_data,
            "config": safeyaml.load(user_data),
            **rendered,
        }
    )
)
