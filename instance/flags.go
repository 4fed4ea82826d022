package instance

import (
	"time"

	"github.com/spf13/pflag"

	"github.com/hearth-serverless/hearth/internal/daemon"
)

// Flags defines the flags of what people may want to set.
func (c *Config) Flags(f *pflag.FlagSet) {
	daemon.BytesVar(f, &c.MemoryBytes, "instance-memory", 1<<30, "memory limit of an instance whose function names none: a function that takes more is killed, and no other")
	f.Int64Var(&c.PidsLimit, "instance-pids", 1024, "processes and threads that an instance may have, against fork bombs")
	f.IntVar(&c.MaxFrozen, "max-frozen", 256, "frozen instances that the node keeps: they cost memory and no processor, and serve again within milliseconds; -1 keeps none")
	daemon.BytesVar(f, &c.FrozenBytes, "frozen-memory", 0, "memory that the frozen instances may keep together; what was needed least, for its size, is ended first (0: a quarter of the node's memory)")
	f.StringVar(&c.Sidecar, "sidecar", "none", "program that stands before each function and holds its concurrency limit (sidecar: the one beside nodeagent); none: requests go to functions directly")
	f.StringVar(&c.NetworkDir, "network-dir", "", "the CRI's folder of network namespaces, if containerd is Hearth's alone: what a killed containerd has left there is removed (default: none)")
	f.StringVar(&c.Kubelet, "kubelet", "", "namespace of Kubernetes whose Pods are the instances: the kubelet makes their sandboxes, and functions run in those; without a value: hearth (default: nodeagent makes sandboxes itself)")
	f.Lookup("kubelet").NoOptDefVal = "hearth"
	f.DurationVar(&c.RuntimeBootTimeout, "runtime-boot-timeout", time.Minute, "how long a Runtime's loader may take from its start until it is ready: interpreter, preloaded libraries, warming up")
	f.Float64Var(&c.MemoryPressure, "memory-pressure", 10, "percent of the last 10 s for which programs of the node waited for memory (avg10 of \"some\" in /proc/pressure/memory) from which on frozen instances are ended, one a second; on kernels without it, when less than 1/16 of the memory is available")
}
