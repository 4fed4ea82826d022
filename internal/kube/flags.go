package kube

import (
	"crypto/rand"
	"errors"
	"fmt"
	"os"

	"github.com/spf13/pflag"
)

// Options are poolmanager's flags for a cluster.
type Options struct {
	// Enabled is --kubernetes.
	Enabled                                       bool
	kubeconfig, namespace, system, image, gateway string
	cpu, memory                                   string
	port, prepare                                 int
}

// Flags adds them.
func (o *Options) Flags(f *pflag.FlagSet) {
	f.BoolVar(&o.Enabled, "kubernetes", false, "work on a cluster: functions, runtimes and warm pools are resources of hearth.dev/v1alpha1, and a Lease says who leads; --store, --node-socket and --pool-size are not used")
	f.StringVar(&o.kubeconfig, "kubeconfig", "", "file that says which cluster (default: the pod's own account, or what kubectl uses)")
	f.StringVar(&o.namespace, "namespace", "hearth", "namespace of functions, runtimes, warm pools and the pods of instances")
	f.StringVar(&o.system, "lease-namespace", "hearth-system", "namespace of the Lease, the certificates and nodeagent's pods")
	f.StringVar(&o.image, "holder-image", "hearth/pause", "image of the pause program, which holds the pod of an instance")
	f.StringVar(&o.cpu, "instance-cpu", "10m", "processor that the pod of a warm instance requests, if its warm pool does not say")
	f.StringVar(&o.memory, "instance-memory", "64Mi", "memory that it requests, likewise")
	f.IntVar(&o.port, "node-port", DefaultNodePort, "port of nodeagent on its node")
	f.IntVar(&o.prepare, "prepare-nodes", 8, "nodes on which the image or code of a function is prepared ahead of use; 0 is all")
	f.StringVar(&o.gateway, "gateway-url", "http://hearth-gateway.hearth-system.svc/fn/", "URL before a function's name, for its status")
}

// Poolmanager is what the flags say. It is to be completed by who serves.
func (o *Options) Poolmanager() (Poolmanager, error) {
	if o.namespace == "" || o.system == "" || o.image == "" {
		return Poolmanager{}, errors.New("--namespace, --lease-namespace and --holder-image must not be empty")
	}
	requests, err := requestsFrom(o.cpu, o.memory)
	if err != nil {
		return Poolmanager{}, err
	}
	host, err := os.Hostname()
	if err != nil {
		return Poolmanager{}, fmt.Errorf("name of this host: %w", err)
	}
	gateway := o.gateway
	return Poolmanager{
		Kubeconfig: o.kubeconfig, Namespace: o.namespace, SystemNamespace: o.system, Identity: host + "-" + rand.Text(), HolderImage: o.image,
		PrepareNodes: o.prepare, Requests: requests, NodePort: o.port, URL: func(function string) string { return gateway + function },
	}, nil
}
