package doctor

// Facts are what Probe found out about the machine.
type Facts struct {
	// Overlay, EROFS, Mounts and BPF say why the kernel lacks a feature; nil if it has it.
	Overlay, EROFS, Mounts, BPF error
	CgroupVersion               int  // 1 or 2; 0 if there are no cgroups
	Systemd                     bool // systemd is the machine's init

	Containerd  Containerd
	Snapshotter error // why it does not answer at the address that containerd has
	Nodeagent   error // why it does not answer
	Kubelet     *Kubelet
	Disk        *Disk // nil if the snapshotter's root is not known
}

// Containerd is the containerd that runs.
type Containerd struct {
	Err     error // why it does not answer; then nothing else is known
	Version string
	// Plugins are those that matter and run, by TYPE.ID, with the error that they failed with; "" is fine.
	Plugins map[string]string
	// Capabilities that the snapshotter's plugin has in the running process, whose configuration can be older than the file.
	Capabilities []string
	// Exports of the snapshotter's plugin in the running process; nil if it has none of that name.
	Exports map[string]string
	// PID of the process, in the pid namespace of that inode; 0 if it does not say.
	PID          int
	PIDNamespace uint64
	// SysResource says whether the process may lower a container's oom_score_adj; nil if it cannot be told.
	SysResource *bool
}

// Kubelet is the part of the kubelet's configuration that has to agree with containerd's.
type Kubelet struct {
	Path         string
	CgroupDriver string
	FailCgroupV1 bool
}

// Disk is the file system of the snapshotter's root.
type Disk struct {
	Path               string
	Err                error // why nothing is known of it
	Type               string
	Bytes, FreeBytes   uint64
	Inodes, FreeInodes uint64 // 0 inodes: the file system makes them as it needs them
}
