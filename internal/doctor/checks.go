package doctor

import (
	"fmt"
	"path/filepath"
	"slices"
	"strings"
)

// location is where a setting is written, in the words of its file's version.
type location struct {
	origin
	table string
}

// where finds the file and table in which to change a setting. What no file says goes to the first file, spelt as its version
// wants it.
func (c *Config) where(keys ...string) location {
	for n := len(keys); n > 0; n-- { // the setting, or else the nearest table that is written somewhere
		if from, ok := c.origins[join(keys[:n]...)]; ok {
			return location{from, spell(from.version, keys[:len(keys)-1])}
		}
	}
	return location{origin{c.files[0].path, c.Version}, spell(c.Version, keys[:len(keys)-1])}
}

// spell is the heading of a table in a version's words.
func spell(version int, keys []string) string {
	if version > 2 || len(keys) < 2 || keys[0] != "plugins" {
		return heading(keys...)
	}
	switch keys[1] {
	case pluginImages:
		if len(keys) == 2 {
			return heading("plugins", pluginCRI, "containerd")
		}
		return heading(append([]string{"plugins", pluginCRI}, keys[2:]...)...)
	case pluginRuntime:
		return heading(append([]string{"plugins", pluginCRI}, keys[2:]...)...)
	}
	return heading(keys...)
}

// change is the fix that gives a setting a value, in TOML.
func (c *Config) change(value string, keys ...string) *Fix {
	at := c.where(keys...)
	return &Fix{File: at.path, Table: at.table, Line: keys[len(keys)-1] + " = " + value}
}

// remove is the fix that takes a setting away.
func (c *Config) remove(keys ...string) *Fix {
	at := c.where(keys...)
	return &Fix{File: at.path, Table: at.table, Line: "# " + keys[len(keys)-1] + " = … (remove it)"}
}

// checkConfig looks for all that makes containerd go past the snapshotter, or start nothing. version is containerd's own, or
// empty if it is not known.
func (c *Config) checkConfig(snapshotter, containerd string) []Finding {
	return slices.Concat(
		c.checkVersion(),
		c.checkProxy(snapshotter),
		c.checkCRI(snapshotter),
		c.checkPath(snapshotter, containerd),
		c.checkTransfer(snapshotter),
		c.checkRegistry(),
		c.checkSandboxImage(),
	)
}

// checkVersion finds settings that the file's version does not look at.
func (c *Config) checkVersion() []Finding {
	const check = "config.version"
	findings := []Finding{ok(check, "version %d in %s, %d more files imported", c.Version, c.files[0].path, len(c.files)-1)}
	if c.Version < 2 {
		findings = []Finding{{check, Warning, fmt.Sprintf("%s says no version, or 1", c.Path),
			"containerd 1.x refuses the tables of version 2 and later in it, and containerd 2 reads it as version 1",
			&Fix{File: c.files[0].path, Line: "version = 3"}}}
	}
	for _, f := range c.files {
		findings = append(findings, misplaced(f)...)
	}
	return findings
}

// misplaced finds what a file has where its version does not look for it.
func misplaced(f file) []Finding {
	var findings []Finding
	say := func(status Status, meaning, table, line string, keys ...string) {
		if _, there := dig(f.tree, keys...); there {
			findings = append(findings, Finding{"config.version", status,
				fmt.Sprintf("%s has %s in a file of version %d", f.path, heading(keys...), f.version), meaning, &Fix{File: f.path, Table: table, Line: line}})
		}
	}
	elsewhere := "containerd 2 looks for it elsewhere in a file of this version, and goes by its default"
	if f.version >= 3 {
		status := Warning // containerd 2.3 and later still take it over from a file of version 3, earlier ones do not
		if f.version >= 4 {
			status = Problem
		}
		for _, key := range moved {
			say(status, elsewhere, heading("plugins", pluginImages), key+" = …", "plugins", pluginCRI, "containerd", key)
		}
		for _, key := range []string{"config_path", "mirrors"} {
			say(status, elsewhere, heading("plugins", pluginImages, "registry"), key+" = …", "plugins", pluginCRI, "registry", key)
		}
		for _, plugin := range []string{pluginCRI, pluginImages, pluginRuntime} {
			say(Warning, elsewhere, heading("plugins", pluginImages, "pinned_images"), "sandbox = …", "plugins", plugin, "sandbox_image")
		}
	}
	if f.version >= 4 {
		say(Problem, "version 4 has the address of the socket among the plugins: containerd listens on its default instead",
			heading("plugins", pluginGRPC), "address = …", "grpc", "address")
	}
	_, runtimes := dig(f.tree, "plugins", pluginCRI, "containerd", "runtimes")
	for _, key := range moved {
		if f.version <= 2 && !runtimes {
			say(Problem, "containerd 2 passes over it in a file that has no table of runtimes, which containerd 1.x does not",
				heading("plugins", pluginCRI, "containerd", "runtimes", "runc"), "runtime_type = 'io.containerd.runc.v2'", "plugins", pluginCRI, "containerd", key)
		}
	}
	if f.version == 2 {
		say(Warning, "containerd 1.x looks for it below [plugins.'"+pluginCRI+"'] in a file of version 2",
			"", "version = 3", "plugins", pluginImages)
	}
	return findings
}

// checkProxy looks at how containerd is told of the snapshotter.
func (c *Config) checkProxy(name string) []Finding {
	const check = "containerd.proxy_plugin"
	proxy := c.table("proxy_plugins", name)
	if proxy == nil {
		at := c.files[0].path
		return []Finding{{check, Problem, fmt.Sprintf("there is no %s", heading("proxy_plugins", name)),
			"containerd does not know the snapshotter, and its CRI plugin does not start if it is set to use it",
			&Fix{File: at, Table: heading("proxy_plugins", name), Line: "type = 'snapshot', address = '/run/hearth/snapshotter.sock', and the exports root and enable_remote_snapshot_annotations = 'true'"}}}
	}
	key := func(keys ...string) []string { return append([]string{"proxy_plugins", name}, keys...) }
	findings := []Finding{c.checkProxyType(check, key), c.checkAnnotationsExport(key), c.checkRoot(key)}
	if slices.Contains(list(proxy["capabilities"]), "rebase") {
		findings = append(findings, Finding{"containerd.rebase", Problem, "the snapshotter is said to have the capability rebase",
			"containerd then prepares layers without their parents, and pulls the layers itself that Hearth has made: each twice, in vain",
			c.remove(key("capabilities")...)})
	}
	return findings
}

func (c *Config) checkProxyType(check string, key func(...string) []string) Finding {
	address := c.text("", key("address")...)
	switch kind := c.text("", key("type")...); {
	case kind != "snapshot":
		return Finding{check, Problem, fmt.Sprintf("type is %q", kind), "containerd takes it for a plugin of another kind", c.change("'snapshot'", key("type")...)}
	case address == "":
		return Finding{check, Problem, "it has no address", "containerd cannot reach the snapshotter", c.change("'/run/hearth/snapshotter.sock'", key("address")...)}
	case !filepath.IsAbs(strings.TrimPrefix(address, "unix://")):
		return Finding{check, Problem, fmt.Sprintf("address is %q", address), "it is the path of a Unix socket, from the root", c.change("'/run/hearth/snapshotter.sock'", key("address")...)}
	default:
		return ok(check, "%s at %s", heading(key()...), address)
	}
}

func (c *Config) checkAnnotationsExport(key func(...string) []string) Finding {
	const check = "containerd.annotations"
	at := key("exports", "enable_remote_snapshot_annotations")
	v, there := c.get(at...)
	if v == "true" {
		return ok(check, "enable_remote_snapshot_annotations = 'true'")
	}
	f := Finding{check, Problem, "enable_remote_snapshot_annotations is not exported",
		"the Transfer service then does not say which image a layer is of, and containerd pulls by itself", c.change("'true'", at...)}
	if there {
		f.Found = fmt.Sprintf("enable_remote_snapshot_annotations = %v", v)
	}
	if _, text := v.(string); there && !text {
		f.Meaning = "exports are strings: containerd does not start with anything else"
	}
	return f
}

func (c *Config) checkRoot(key func(...string) []string) Finding {
	const check = "containerd.exports_root"
	at := key("exports", "root")
	root := c.text("", at...)
	if root == "" {
		return Finding{check, Warning, "the snapshotter's root is not exported",
			"the kubelet watches the disk of containerd's own folder instead, and evicts too late when Hearth's fills up",
			c.change("'/var/lib/hearth/snapshotter'", at...)}
	}
	return ok(check, "%s", root)
}

// checkCRI looks at which snapshotter the CRI uses, and whether there is a CRI at all.
func (c *Config) checkCRI(name string) []Finding {
	const check = "containerd.cri"
	var findings []Finding
	for _, id := range list(c.tree["disabled_plugins"]) {
		if slices.Contains([]string{"cri", pluginCRI, pluginImages, pluginRuntime, pluginTransfer}, id) {
			findings = append(findings, Finding{check, Problem, fmt.Sprintf("disabled_plugins has %q", id),
				"without it there are no pods; Docker's package of containerd comes like this",
				c.remove("disabled_plugins")})
		}
	}
	at := []string{"plugins", pluginImages, "snapshotter"}
	used := c.text("overlayfs", at...)
	if used != name && c.text("", "plugins", pluginImages, "runtime_platforms", name, "snapshotter") == name {
		if len(findings) == 0 {
			findings = append(findings, ok(check, "Hearth's own pulls, for the runtime handler %s, have the snapshotter %s; all others %s", name, name, used))
		}
		return findings
	}
	if used != name {
		findings = append(findings, Finding{check, Problem, fmt.Sprintf("the CRI's snapshotter is %s", used),
			"the kubelet's images are pulled past Hearth", c.change("'"+name+"'", at...)})
	}
	if len(findings) == 0 {
		findings = append(findings, ok(check, "snapshotter = '%s'", name))
	}
	for _, table := range []struct {
		keys    []string
		meaning string
	}{
		{[]string{"plugins", pluginImages, "runtime_platforms"}, "pods of this runtime class are pulled past Hearth"},
		{[]string{"plugins", pluginRuntime, "containerd", "runtimes"}, "containers of this runtime class are made past Hearth"},
	} {
		for _, runtime := range sorted(c.table(table.keys...)) {
			at := append(slices.Clone(table.keys), runtime, "snapshotter")
			if used := c.text("", at...); used != "" && used != name {
				findings = append(findings, Finding{check, Warning, fmt.Sprintf("runtime %s has the snapshotter %s", runtime, used),
					table.meaning, c.change("'"+name+"'", at...)})
			}
		}
	}
	return findings
}

func sorted(table map[string]any) []string {
	keys := make([]string, 0, len(table))
	for key := range table {
		keys = append(keys, key)
	}
	slices.Sort(keys)
	return keys
}

// localPull says by which setting, if any, the CRI pulls by its older path and not through the Transfer service.
func (c *Config) localPull() (keys []string, local bool) {
	at := func(keys ...string) []string { return append([]string{"plugins", pluginImages}, keys...) }
	switch {
	case c.flag(false, at("use_local_image_pull")...):
		return at("use_local_image_pull"), true
	case !c.flag(true, at("disable_snapshot_annotations")...):
		return at("disable_snapshot_annotations"), true
	case c.flag(false, at("discard_unpacked_layers")...):
		return at("discard_unpacked_layers"), true
	case len(c.table(at("registry", "mirrors")...)) > 0:
		return at("registry", "mirrors"), true
	case len(c.table(at("registry", "configs")...)) > 0:
		return at("registry", "configs"), true
	case len(c.table(at("registry", "auths")...)) > 0:
		return at("registry", "auths"), true
	case c.number(3, at("max_concurrent_downloads")...) != 3:
		return at("max_concurrent_downloads"), true
	case c.flag(false, at("image_pull_with_sync_fs")...):
		return at("image_pull_with_sync_fs"), true
	}
	return nil, false
}

// checkPath finds out by which of its two ways the CRI pulls, and whether layers are named to the snapshotter on it.
func (c *Config) checkPath(snapshotter, containerd string) []Finding {
	const check = "containerd.pull_path"
	annotations := []string{"plugins", pluginImages, "disable_snapshot_annotations"}
	disabled := c.flag(true, annotations...)
	by, local := c.localPull()
	old := strings.HasPrefix(strings.TrimPrefix(containerd, "v"), "1.")
	var findings []Finding
	switch {
	case (local || old) && disabled:
		why := "containerd " + containerd
		if local {
			why = by[len(by)-1]
		}
		findings = append(findings, Finding{check, Problem, why + " has the CRI pull by its older path, with disable_snapshot_annotations = true",
			"on that path layers are not named to the snapshotter, and containerd pulls by itself", c.change("false", annotations...)})
	case local:
		findings = append(findings, ok(check, "the CRI's older path, because of %s, with annotations", by[len(by)-1]))
	case containerd == "" && c.Version <= 2 && disabled:
		findings = append(findings, Finding{check, Warning, "a file of version 2 without disable_snapshot_annotations = false",
			"containerd 1.x would not name layers to the snapshotter; containerd 2 does, through the Transfer service", c.change("false", annotations...)})
	default:
		findings = append(findings, ok(check, "the Transfer service"))
	}
	discard := []string{"plugins", pluginImages, "discard_unpacked_layers"}
	if c.flag(false, discard...) {
		findings = append(findings, Finding{"containerd.discard_unpacked_layers", Warning, "discard_unpacked_layers = true",
			"Hearth stores no blobs that could be discarded; it keeps the CRI on its older path, and takes away what --keep-blobs keeps",
			c.change("false", discard...)})
	}
	return findings
}

// checkTransfer looks at whether the Transfer service unpacks for the snapshotter. It matters for the CRI unless that pulls by
// its older path, and for `ctr images pull`.
func (c *Config) checkTransfer(name string) []Finding {
	const check = "containerd.unpack_config"
	at := []string{"plugins", pluginTransfer, "unpack_config"}
	entries, _ := c.get(at...)
	var used []string
	for _, entry := range asTables(entries) {
		snapshotter, _ := entry["snapshotter"].(string)
		differ, _ := entry["differ"].(string)
		used = append(used, snapshotter)
		if snapshotter != name {
			continue
		}
		if differ == "" {
			return []Finding{{check, Problem, fmt.Sprintf("the unpack_config for %s names no differ", name),
				"containerd chooses one by platform, and which one changes with its version; where there is none it does not start",
				c.inEntry(at, "differ = 'walking'")}}
		}
		return append([]Finding{ok(check, "snapshotter %s, differ %s", snapshotter, differ)}, c.checkUnpacks()...)
	}
	_, local := c.localPull()
	f := Finding{check, Problem, "no unpack_config names the snapshotter " + name,
		"the Transfer service stores images and does not unpack them, or unpacks them for another snapshotter: pods do not start",
		c.inEntry(at, fmt.Sprintf("platform = 'linux', snapshotter = '%s', differ = 'walking'", name))}
	if len(used) > 0 {
		f.Found += "; they name " + strings.Join(used, ", ")
	}
	if local {
		f.Status, f.Meaning = Warning, "the CRI pulls by its older path and does not need it; `ctr images pull` does"
	}
	return []Finding{f}
}

func (c *Config) inEntry(keys []string, line string) *Fix {
	at := c.where(append(slices.Clone(keys), "")...)
	return &Fix{File: at.path, Table: "[" + heading(keys...) + "]", Line: line}
}

func asTables(v any) []map[string]any {
	items, _ := v.([]any)
	var out []map[string]any
	for _, item := range items {
		if table, ok := item.(map[string]any); ok {
			out = append(out, table)
		}
	}
	return out
}

func (c *Config) checkUnpacks() []Finding {
	at := []string{"plugins", pluginTransfer, "max_concurrent_unpacks"}
	if n := c.number(1, at...); n > 1 {
		return []Finding{{"containerd.parallel_unpack", Warning, fmt.Sprintf("max_concurrent_unpacks = %d", n),
			"containerd's own parallel unpacking loses remote snapshots (its issue 13264); Hearth unpacks all layers of an image at once by itself",
			c.change("1", at...)}}
	}
	return nil
}

// checkRegistry looks at whether containerd and nodeagent find the same registries.
func (c *Config) checkRegistry() []Finding {
	const check = "containerd.registry"
	at := func(keys ...string) []string { return append([]string{"plugins", pluginImages, "registry"}, keys...) }
	var findings []Finding
	for _, key := range []string{"mirrors", "configs", "auths"} {
		if len(c.table(at(key)...)) > 0 {
			findings = append(findings, Finding{check, Problem, fmt.Sprintf("registry.%s is set", key),
				"nodeagent does not read it, and so pulls from elsewhere or without credentials; containerd is giving it up as well: move it to hosts.toml files, and credentials to pull secrets",
				c.remove(at(key)...)})
		}
	}
	if len(findings) > 0 {
		return findings
	}
	path := c.text("", at("config_path")...)
	if path == "" {
		return []Finding{{check, Warning, "registry.config_path is empty",
			"containerd looks for hosts.toml in its default folders, which depend on its version; name one folder here and to nodeagent (--hosts-dir), so that both use the same mirrors",
			c.change("'/etc/containerd/certs.d'", at("config_path")...)}}
	}
	return []Finding{ok(check, "config_path = '%s'; nodeagent's --hosts-dir must be the same", path)}
}

// checkSandboxImage looks at whether the image of every pod's first container is protected.
func (c *Config) checkSandboxImage() []Finding {
	const check = "containerd.sandbox_image"
	at := []string{"plugins", pluginImages, "pinned_images", "sandbox"}
	image := c.text("registry.k8s.io/pause (containerd's default)", at...)
	if image == "" {
		fix := c.change("'registry.k8s.io/pause:3.10.2'", at...)
		if c.where(at...).version <= 2 {
			fix.Table, fix.Line = heading("plugins", pluginCRI), "sandbox_image = 'registry.k8s.io/pause:3.10.2'"
		}
		return []Finding{{check, Problem, "the sandbox's image is empty",
			"no pod can start without it, and the kubelet's garbage collection removes one that is not pinned", fix}}
	}
	return []Finding{ok(check, "%s is pinned", image)}
}

// systemdCgroup says whether the CRI's default runtime makes cgroups through systemd.
func (c *Config) systemdCgroup() (keys []string, systemd bool) {
	runtimes := []string{"plugins", pluginRuntime, "containerd"}
	name := c.text("runc", append(slices.Clone(runtimes), "default_runtime_name")...)
	keys = append(slices.Clone(runtimes), "runtimes", name, "options", "SystemdCgroup")
	return keys, c.flag(false, keys...)
}

// Socket is where containerd listens.
func (c *Config) Socket() string {
	return c.text("/run/containerd/containerd.sock", "plugins", pluginGRPC, "address")
}

// Proxy is where containerd finds the snapshotter, and the root that it exports; empty if they are not said.
func (c *Config) Proxy(snapshotter string) (address, root string) {
	return strings.TrimPrefix(c.text("", "proxy_plugins", snapshotter, "address"), "unix://"),
		c.text("", "proxy_plugins", snapshotter, "exports", "root")
}
