package cluster

import (
	"fmt"
	"os"
	"time"

	"connectrpc.com/connect"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
)

// Names that both this package and the daemons' manifests go by.
const (
	// DefaultNamespace has Functions, Runtimes, WarmPools and Instances.
	DefaultNamespace = "hearth"
	// SystemNamespace has the daemons.
	SystemNamespace = "hearth-system"
)

// inCluster is what a context is called that no kubeconfig has: the pod's own service account.
const inCluster = "in-cluster"

// dialTime bounds how long an API server that does not answer is waited for.
const dialTime = 10 * time.Second

// Config says which cluster is meant, by kubectl's conventions.
type Config struct {
	// Kubeconfig is a file; empty for $KUBECONFIG, then ~/.kube/config, then the pod's own service account.
	Kubeconfig string
	// Context of the kubeconfig; empty for its current one.
	Context string
	// Namespace of Functions; empty for DefaultNamespace.
	Namespace string
}

func (c Config) loader() clientcmd.ClientConfig {
	rules := clientcmd.NewDefaultClientConfigLoadingRules()
	rules.ExplicitPath = c.Kubeconfig
	rules.WarnIfAllMissing = false
	return clientcmd.NewNonInteractiveDeferredLoadingClientConfig(rules, &clientcmd.ConfigOverrides{CurrentContext: c.Context})
}

// Configured says whether there is a cluster to talk to without any flag: a current context, or a pod's service account. It reads files alone.
func Configured(c Config) bool {
	raw, err := c.loader().RawConfig()
	if err == nil && raw.CurrentContext != "" && raw.Contexts[raw.CurrentContext] != nil {
		return true
	}
	return err == nil && inPod()
}

// inPod says whether this is a pod with a service account.
func inPod() bool {
	if os.Getenv("KUBERNETES_SERVICE_HOST") == "" {
		return false
	}
	_, err := os.Stat("/var/run/secrets/kubernetes.io/serviceaccount/token")
	return err == nil
}

// load reads the configuration, and says what the context is called.
func (c Config) load() (*rest.Config, string, error) {
	loader := c.loader()
	config, err := loader.ClientConfig()
	if err != nil {
		return nil, "", connect.NewError(connect.CodeUnavailable, fmt.Errorf(
			"no cluster to talk to: %w; name one by --kubeconfig and --context, or $KUBECONFIG", err))
	}
	name := c.Context
	if name == "" {
		raw, err := loader.RawConfig()
		if err == nil {
			name = raw.CurrentContext
		}
	}
	if name == "" {
		name = inCluster
	}
	config.QPS = -1 // the API server has its own fairness; a command makes few requests
	config.UserAgent = "hearth"
	config.WarningHandler = rest.NoWarnings{}
	config.Dial = dialWithin(dialTime)
	return config, name, nil
}
