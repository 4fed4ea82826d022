package doctor

import (
	"fmt"
	"slices"
)

// Diagnose judges a configuration, and, unless facts is nil, the machine. It reads nothing and changes nothing. The findings are
// in the order in which to mend them.
func Diagnose(c *Config, facts *Facts, snapshotter string) []Finding {
	if facts == nil {
		return c.checkConfig(snapshotter, "")
	}
	return slices.Concat(
		facts.checkKernel(),
		c.checkConfig(snapshotter, facts.Containerd.Version),
		c.checkRunning(facts, snapshotter),
		c.checkOOMScore(facts),
		c.checkCgroups(facts),
		facts.checkDaemons(),
		facts.checkDisk(),
	)
}

func (f *Facts) checkKernel() []Finding {
	var findings []Finding
	for _, k := range []struct {
		check   string
		err     error
		status  Status
		meaning string
		do      string
	}{
		{"kernel.overlayfs", f.Overlay, Problem, "every container's root is an overlay", "modprobe overlay, or a kernel with CONFIG_OVERLAY_FS"},
		{"kernel.mounts", f.Mounts, Warning, "code cannot be mounted into an Instance that runs", "Linux 5.2 or newer, and a seccomp profile that allows open_tree and move_mount"},
		{"kernel.erofs", f.EROFS, Warning, "layers are kept as directories, which is slower for many small files", "Linux 6.12 or newer with CONFIG_EROFS_FS and CONFIG_EROFS_FS_BACKED_BY_FILE"},
		{"kernel.ebpf", f.BPF, Warning, "the kernel does not tell when a Function listens, and nodeagent dials it with short pauses instead", "root with CAP_BPF and CAP_PERFMON, and a kernel with BTF (CONFIG_DEBUG_INFO_BTF)"},
	} {
		if k.err == nil {
			findings = append(findings, ok(k.check, "there"))
			continue
		}
		findings = append(findings, Finding{k.check, k.status, k.err.Error(), k.meaning, &Fix{Do: k.do}})
	}
	return findings
}

// checkRunning compares what runs with what the file says.
func (c *Config) checkRunning(f *Facts, snapshotter string) []Finding {
	const check = "containerd.running"
	if f.Containerd.Err != nil {
		return []Finding{{check, Problem, fmt.Sprintf("%s: %v", c.Socket(), f.Containerd.Err), "without containerd there are no images and no containers",
			&Fix{Do: "start containerd, or name its configuration with --config"}}}
	}
	findings := []Finding{ok(check, "containerd %s at %s", f.Containerd.Version, c.Socket())}
	for _, id := range sortedKeys(f.Containerd.Plugins) {
		if fault := f.Containerd.Plugins[id]; fault != "" {
			findings = append(findings, Finding{check, Problem, fmt.Sprintf("plugin %s did not start: %s", id, fault),
				"what it does is missing in the containerd that runs", &Fix{Do: "mend the configuration as said here, then restart containerd"}})
		}
	}
	_, loaded := f.Containerd.Plugins["io.containerd.snapshotter.v1."+snapshotter]
	if !loaded && c.table("proxy_plugins", snapshotter) != nil {
		findings = append(findings, Finding{check, Problem, fmt.Sprintf("the containerd that runs does not know the snapshotter %s, its file does", snapshotter),
			"it was started before the file was changed, or with another file", &Fix{Do: "restart containerd"}})
	}
	if slices.Contains(f.Containerd.Capabilities, "rebase") {
		findings = append(findings, Finding{"containerd.rebase", Problem, "the containerd that runs has the snapshotter with the capability rebase",
			"it prepares layers without their parents, and pulls the layers itself that Hearth has made", &Fix{Do: "restart containerd once its file has no such capability"}})
	}
	return findings
}

func sortedKeys(m map[string]string) []string {
	keys := make([]string, 0, len(m))
	for key := range m {
		keys = append(keys, key)
	}
	slices.Sort(keys)
	return keys
}

func (c *Config) checkOOMScore(f *Facts) []Finding {
	const check = "containerd.oom_score"
	at := []string{"plugins", pluginRuntime, "restrict_oom_score_adj"}
	restricted := c.flag(false, at...)
	switch may := f.Containerd.SysResource; {
	case f.Containerd.Err != nil:
		return nil
	case restricted:
		return []Finding{ok(check, "restrict_oom_score_adj = true")}
	case may == nil:
		return []Finding{{check, Warning, "it cannot be told whether containerd has CAP_SYS_RESOURCE",
			"without it and without restrict_oom_score_adj = true no sandbox starts", c.change("true", at...)}}
	case !*may:
		return []Finding{{check, Problem, "containerd has no CAP_SYS_RESOURCE",
			"it cannot lower the oom_score_adj of a sandbox, and so none starts", c.change("true", at...)}}
	}
	return []Finding{ok(check, "containerd has CAP_SYS_RESOURCE")}
}

// checkCgroups looks at whether all who make cgroups make them in the same way.
func (c *Config) checkCgroups(f *Facts) []Finding {
	const check = "cgroups"
	at, systemd := c.systemdCgroup()
	driver := map[bool]string{false: "cgroupfs", true: "systemd"}[systemd]
	if f.CgroupVersion == 0 {
		return []Finding{{check, Problem, "no cgroups are mounted", "nothing can be limited, and no container starts",
			&Fix{Do: "mount -t cgroup2 none /sys/fs/cgroup"}}}
	}
	findings := []Finding{ok(check, "version %d, containerd's driver is %s", f.CgroupVersion, driver)}
	if systemd && !f.Systemd {
		findings = append(findings, Finding{check, Problem, "SystemdCgroup = true on a machine without systemd", "no container starts", c.change("false", at...)})
	}
	if k := f.Kubelet; k != nil && k.CgroupDriver != driver {
		findings = append(findings, Finding{check, Warning, fmt.Sprintf("the kubelet's cgroupDriver is %s (%s), containerd's is %s", k.CgroupDriver, k.Path, driver),
			"unless the kubelet asks containerd for the driver (1.34 and later, with containerd 2), pods do not start", c.change(fmt.Sprint(k.CgroupDriver == "systemd"), at...)})
	}
	if k := f.Kubelet; k != nil && f.CgroupVersion == 1 && k.FailCgroupV1 {
		findings = append(findings, Finding{check, Problem, "cgroups are of version 1, and the kubelet refuses that",
			"from 1.35 on the kubelet does not start", &Fix{File: k.Path, Line: "failCgroupV1: false", Do: "better: boot with cgroups of version 2"}})
	}
	return findings
}

func (f *Facts) checkDaemons() []Finding {
	var findings []Finding
	for _, d := range []struct {
		check   string
		err     error
		meaning string
		do      string
	}{
		{"nodeagent.snapshotter", f.Snapshotter, "containerd cannot prepare a snapshot: no image is pulled and no container starts", "start nodeagent with --snapshotter-socket as in containerd's configuration"},
		{"nodeagent.api", f.Nodeagent, "no Instance can be had on this node", "start nodeagent, or name its socket with --node-socket"},
	} {
		if d.err == nil {
			findings = append(findings, ok(d.check, "answers"))
			continue
		}
		findings = append(findings, Finding{d.check, Problem, d.err.Error(), d.meaning, &Fix{Do: d.do}})
	}
	return findings
}

// Free space below which a finding is made. nodeagent's own threshold is a flag; these say when a human should look.
const (
	lowPercent   = 15
	emptyPercent = 3
)

func (f *Facts) checkDisk() []Finding {
	const check = "disk"
	d := f.Disk
	switch {
	case d == nil:
		return nil
	case d.Err != nil:
		return []Finding{{check, Problem, d.Err.Error(), "layers have no place to be", &Fix{Do: "make it, or start nodeagent with --snapshotter-root as containerd's configuration exports it"}}}
	case d.Type == "overlay":
		return []Finding{{check, Problem, d.Path + " is on an overlay", "an overlay cannot be the upper layer of another: no container starts",
			&Fix{Do: "mount a disk of the machine there (a hostPath in a pod) and keep --snapshotter-root on it"}}}
	case d.Type == "nfs" || d.Type == "fuse":
		return []Finding{{check, Problem, d.Path + " is on " + d.Type, "it cannot be the upper layer of an overlay", &Fix{Do: "keep --snapshotter-root on ext4 or xfs"}}}
	}
	var findings []Finding
	if d.Type == "tmpfs" {
		findings = append(findings, Finding{check, Warning, d.Path + " is in memory", "layers take the memory of pods, and are gone after a restart of the machine", &Fix{Do: "keep --snapshotter-root on ext4 or xfs"}})
	}
	for _, s := range []struct {
		what        string
		free, total uint64
	}{{"bytes", d.FreeBytes, d.Bytes}, {"inodes", d.FreeInodes, d.Inodes}} {
		if s.total == 0 {
			continue
		}
		percent := 100 * float64(s.free) / float64(s.total)
		status := OK
		switch {
		case percent < emptyPercent:
			status = Problem
		case percent < lowPercent:
			status = Warning
		}
		finding := Finding{Check: check, Status: status, Found: fmt.Sprintf("%s (%s): %.0f %% of %d %s are free", d.Path, d.Type, percent, s.total, s.what)}
		if status != OK {
			finding.Meaning = "pulls are refused when the disk is nearly full"
			finding.Fix = &Fix{Do: "free space, remove images, or give --snapshotter-root a larger disk"}
		}
		findings = append(findings, finding)
	}
	return findings
}
