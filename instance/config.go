package instance

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/hearth-serverless/hearth/internal/host"
)

// Labels of sandboxes and containers: the engine's whole memory across restarts.
const (
	labelNode     = "hearth.dev/node"
	labelInstance = "hearth.dev/instance"
	labelClaim    = "hearth.dev/claim"
	labelEpoch    = "hearth.dev/epoch"
	labelFunction = "hearth.dev/function"
	labelRevision = "hearth.dev/revision"
	labelImage    = "hearth.dev/image"
	labelChain    = "hearth.dev/chain"
	labelPort     = "hearth.dev/port"
	labelCPU      = "hearth.dev/cpu-millis"
	labelFrozen   = "hearth.dev/frozen"  // since when, RFC 3339
	labelVersion  = "hearth.dev/version" // of the Instance when it was recorded

	labelRuntime    = "hearth.dev/runtime"
	labelGeneration = "hearth.dev/runtime-generation"
	labelLoader     = "hearth.dev/loader"     // "gone" when the Function's process has taken its place
	labelCode       = "hearth.dev/code"       // key of the snapshot
	labelCodeChain  = "hearth.dev/code-chain" // of the package's layers

	labelPod    = "hearth.dev/pod"  // of a worker: the Instance in whose sandbox it is
	labelSlot   = "hearth.dev/slot" // of a worker: its place there
	labelTenant = "hearth.dev/tenant"
	labelGroup  = "hearth.dev/group"

	labelCgroup = "hearth.dev/cgroup" // of the pod, if the kubelet has made it
)

// Phase is a part of an image's way to the node, at its real time.
type Phase struct {
	Name     string
	Start    time.Time
	Duration time.Duration
	Busy     time.Duration // of Duration, the time spent working; 0 if not known
}

// ListenWatcher tells when a process begins to listen; see internal/bpf. The channel gets the address that is listened on.
type ListenWatcher interface {
	Expect(netns uint64, port uint16) (told <-chan netip.Addr, cancel func())
}

// Config of an Engine. Node, Root, Address and CgroupParent are required.
type Config struct {
	// Node is this node's name: a DNS label.
	Node string
	// Root is the directory of log files and of files that are mounted into Instances; absolute.
	Root string
	// Address is the path of containerd's socket.
	Address string
	// Namespace of containerd in which the CRI works; default "k8s.io".
	Namespace string
	// Snapshotter that the CRI uses; default "hearth".
	Snapshotter string
	// CgroupParent is the absolute cgroup path under which each Instance gets a cgroup of its own.
	CgroupParent string
	// Kubelet is the namespace of Kubernetes whose Pods are Instances: each is named by its Instance's id, has it as the label
	// hearth.dev/instance, and one container, "function", that only waits. The kubelet makes their sandboxes and removes them. Empty: the
	// engine does both.
	Kubelet string
	// NetworkDir is the CRI's folder of network namespaces, if its containerd is ours alone: those that have been nobody's for NetworkAge,
	// by default 2 minutes, are removed. Empty: none are.
	NetworkDir string
	NetworkAge time.Duration
	// ResolvConf is copied into Instances; default /etc/resolv.conf.
	ResolvConf string
	// Launcher is the program that waits in warm Instances; default: launcher, beside this program.
	Launcher string
	// LogWriter is the program that writes the output of Instances to their logs; default: logwriter, beside Launcher.
	LogWriter string
	// Sidecar is the program that stands before each Function; a bare name is looked for beside this program. Empty or "none":
	// gateways' requests come to the Function itself. Instances keep what they were made with.
	Sidecar string

	// Phases returns the phases of the last pull of an image; nil if nobody knows.
	Phases func(imageRef string) ([]Phase, bool)
	// Listens tells when a Function listens. Nil: the engine tries to connect until it can.
	Listens ListenWatcher
	// Prefetch learns what starts read, and reads it ahead of them. Nil: nobody does.
	Prefetch Prefetcher
	// Credentials of the registry that an image is pulled from; nil or empty answers mean none.
	Credentials func(ctx context.Context, imageRef string) (user, secret string, err error)
	// Fetch brings an image's layers before containerd is asked for it; nil: nobody does. What goes wrong comes up in the pull.
	Fetch func(ctx context.Context, imageRef string) error
	// Dial tries to connect to a Function; default is TCP.
	Dial func(ctx context.Context, address netip.AddrPort) error

	// DefaultClaimTimeout holds for claims without a deadline; default 30 s.
	DefaultClaimTimeout time.Duration
	// Grace between SIGTERM and SIGKILL for an Instance that serves, when the caller names none; default 5 s.
	Grace time.Duration
	// PidsLimit is how many processes and threads an Instance may have; default 1024.
	PidsLimit int64
	// MemoryBytes is the memory limit of an Instance whose Function names none; default 1 GiB.
	MemoryBytes int64
	// MaxFrozen is how many frozen Instances the node keeps; default 256, negative none.
	MaxFrozen int
	// FrozenBytes is how much memory they may keep, as it was when each was frozen; default a quarter of the node's.
	FrozenBytes int64
	// MemoryPressure is the part of the last ten seconds, in percent, for which some process of the node has waited for memory,
	// from which on frozen Instances are given up; default 10. Where the kernel does not tell, 1/16 of the memory has to be free.
	MemoryPressure float64
	// RuntimeBootTimeout is how long a Runtime may take from its process's start until it is ready; default 60 s.
	RuntimeBootTimeout time.Duration
	// KeptLogs is how many log files of ended Instances are kept for each Function; default 10.
	KeptLogs int
	// MaxLogBytes is what a log file takes of the disk: it keeps its end; default 64 MiB.
	MaxLogBytes int64

	Logger     *slog.Logger          // default: none
	Registerer prometheus.Registerer // default: a registry of its own
}

func (c Config) withDefaults() (Config, error) {
	var problems []error
	for part := range strings.SplitSeq(c.Node, ".") { // Kubernetes' nodes have names of several
		if err := checkLabel("node name "+c.Node+": part", part); err != nil {
			problems = append(problems, err)
			break
		}
	}
	if c.Kubelet != "" {
		problems = append(problems, checkLabel("namespace of instances", c.Kubelet))
	}
	if c.PidsLimit < 0 || c.MemoryBytes < 0 || c.FrozenBytes < 0 || c.MemoryPressure < 0 {
		problems = append(problems, errors.New("a bound is negative"))
	}
	for what, path := range map[string]string{"root": c.Root, "containerd address": c.Address, "cgroup parent": c.CgroupParent} {
		if !filepath.IsAbs(path) || filepath.Clean(path) != path || path == "/" {
			problems = append(problems, fmt.Errorf("%s %q is not a clean absolute path", what, path))
		}
	}
	setDefault(&c.Namespace, "k8s.io")
	setDefault(&c.Snapshotter, "hearth")
	setDefault(&c.ResolvConf, "/etc/resolv.conf")
	if c.Launcher == "" {
		self, err := os.Executable()
		if err != nil {
			problems = append(problems, fmt.Errorf("find the launcher: %w", err))
		}
		c.Launcher = filepath.Join(filepath.Dir(self), "launcher")
	}
	setDefault(&c.LogWriter, filepath.Join(filepath.Dir(c.Launcher), "logwriter"))
	if c.Sidecar == "none" {
		c.Sidecar = ""
	}
	if c.Sidecar != "" && filepath.Base(c.Sidecar) == c.Sidecar {
		c.Sidecar = filepath.Join(filepath.Dir(c.Launcher), c.Sidecar)
	}
	setDefault(&c.DefaultClaimTimeout, 30*time.Second)
	setDefault(&c.Grace, 5*time.Second)
	setDefault(&c.PidsLimit, 1024)
	setDefault(&c.MemoryBytes, 1<<30)
	setDefault(&c.MaxFrozen, 256)
	setDefault(&c.MemoryPressure, 10)
	if c.FrozenBytes == 0 {
		all, err := host.MemoryBytes("/proc")
		if err != nil {
			problems = append(problems, fmt.Errorf("the node's memory: %w", err))
		}
		c.FrozenBytes = all / 4
	}
	setDefault(&c.RuntimeBootTimeout, time.Minute)
	setDefault(&c.NetworkAge, strayAge)
	setDefault(&c.KeptLogs, 10)
	setDefault(&c.MaxLogBytes, 64<<20)
	if c.Dial == nil {
		c.Dial = dialTCP
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	if c.Registerer == nil {
		c.Registerer = prometheus.NewRegistry()
	}
	return c, errors.Join(problems...)
}

func setDefault[T comparable](v *T, to T) {
	var zero T
	if *v == zero {
		*v = to
	}
}

func dialTCP(ctx context.Context, address netip.AddrPort) error {
	conn, err := (&net.Dialer{Timeout: time.Second}).DialContext(ctx, "tcp", address.String())
	if err != nil {
		return err
	}
	return conn.Close()
}
