package bench

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
)

// cluster is a Kubernetes on which Hearth is installed: what kubectl's conventions name. The API server is asked through a kubectl
// proxy, over connections that stay open.
type cluster struct {
	o       *Options
	env     []string
	kubectl string
	proxy   *process
	api     *http.Client
	dir     string
	client  *http.Client // of Functions and pods
	gateway string
}

// Namespaces of Functions and their Instances, of the daemons, as they are installed, and of what Hearth is compared with.
const (
	namespace       = "hearth"
	systemNamespace = "hearth-system"
	plainNamespace  = "hearth-bench"
)

// withCluster calls run with the cluster that $KUBECONFIG names, on which Hearth is installed, or with one that is made for it.
func withCluster(ctx context.Context, o *Options, run func(*cluster) error) (err error) {
	k := &cluster{o: o, env: []string{"KUBECONFIG=" + os.Getenv("KUBECONFIG")}}
	if os.Getenv("KUBECONFIG") == "" {
		o.say("$KUBECONFIG names no cluster: making one on this machine")
		kubeconfig, registry, end, err := o.Cluster(ctx, func(line string) { o.say("cluster: %s", line) })
		if err != nil {
			return fmt.Errorf("make a cluster: %w", err)
		}
		defer func() { err = errors.Join(err, end()) }()
		hosts, err := plainHosts(registry)
		if err != nil {
			return err
		}
		defer os.RemoveAll(hosts)
		k.env = []string{"KUBECONFIG=" + kubeconfig, "HEARTH_HOSTS_DIR=" + hosts}
		o.Registry = registry
		o.say("installing Hearth on it")
		if err := k.run(ctx, nil, filepath.Join(o.Bin, "hearth"), "install", "--push", "--registry", registry, "--restart-command", "kill $CONTAINERD_PID"); err != nil {
			return err
		}
	}
	if o.Registry == "" {
		return errors.New("name a registry that this machine can push to and the cluster's nodes pull from, by --registry HOST[:PORT]")
	}
	if err := k.connect(ctx); err != nil {
		return errors.Join(err, k.close())
	}
	defer func() { err = errors.Join(err, k.close()) }()
	return run(k)
}

// plainHosts is a folder that says of a registry that it speaks plain HTTP, as that of a cluster of this machine does.
func plainHosts(registry string) (string, error) {
	dir, err := os.MkdirTemp("", "hearth-hosts-")
	if err != nil {
		return "", fmt.Errorf("make a folder for hosts: %w", err)
	}
	err = os.Mkdir(filepath.Join(dir, registry), 0o755)
	if err == nil {
		err = os.WriteFile(filepath.Join(dir, registry, "hosts.toml"), fmt.Appendf(nil, "server = %q\n", "http://"+registry), 0o644)
	}
	if err != nil {
		return "", errors.Join(fmt.Errorf("write hosts.toml of %s: %w", registry, err), os.RemoveAll(dir))
	}
	return dir, nil
}

// connect finds the API server, and Hearth's gateway.
func (k *cluster) connect(ctx context.Context) (err error) {
	o := k.o
	if k.kubectl, err = exec.LookPath(filepath.Join(o.Cache, "tools", "kubernetes", "kubectl")); err != nil {
		if k.kubectl, err = exec.LookPath("kubectl"); err != nil {
			return errors.New("there is no kubectl: run `make kubernetes`, or put one on the PATH")
		}
	}
	if k.dir, err = os.MkdirTemp("", "hearth-k8s-"); err != nil {
		return fmt.Errorf("make a folder for sockets: %w", err)
	}
	socket := filepath.Join(k.dir, "api.sock")
	if k.proxy, err = startProcess(k.dir, k.env, k.kubectl, "proxy", "--unix-socket="+socket, "--reject-methods=^$"); err != nil {
		return err
	}
	if err := k.proxy.await(ctx, "unix", socket); err != nil {
		return err
	}
	k.api = &http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", socket)
	}}}
	k.client = &http.Client{Transport: &http.Transport{DisableCompression: true, MaxIdleConnsPerHost: mostAtOnce}}
	return k.findGateway(ctx)
}

func (k *cluster) close() error {
	if k.proxy != nil {
		k.proxy.stop()
	}
	for _, c := range []*http.Client{k.api, k.client} {
		if c != nil {
			c.CloseIdleConnections()
		}
	}
	return os.RemoveAll(k.dir)
}

// findGateway takes the first gateway that is ready and can be reached from here by its pod's address.
func (k *cluster) findGateway(ctx context.Context) error {
	if k.o.Gateway != "" {
		k.gateway = strings.TrimSuffix(k.o.Gateway, "/")
		return nil
	}
	var pods podList
	if err := k.get(ctx, "/api/v1/namespaces/"+systemNamespace+"/pods?labelSelector=app.kubernetes.io/component%3Dgateway,app.kubernetes.io/name%3Dhearth", &pods); err != nil {
		return fmt.Errorf("find the gateway: %w", err)
	}
	for _, p := range pods.Items {
		if p.Status.PodIP == "" {
			continue
		}
		if err := awaitListener(ctx, p.Status.PodIP+":8080", awaitPause); err == nil {
			k.gateway = "http://" + p.Status.PodIP + ":8080"
			return nil
		}
	}
	return fmt.Errorf("no gateway in namespace %s can be reached from here: install Hearth (`hearth install`), or name its address by --gateway", systemNamespace)
}

// podList is what this harness reads of pods.
type podList struct {
	Items []struct {
		Metadata struct {
			Name string `json:"name"`
		} `json:"metadata"`
		Status struct {
			PodIP string `json:"podIP"`
		} `json:"status"`
	} `json:"items"`
}

// get reads an object, or a list.
func (k *cluster) get(ctx context.Context, path string, to any) error {
	body, err := k.call(ctx, http.MethodGet, path, "", nil)
	if err != nil {
		return err
	}
	if err := json.Unmarshal(body, to); err != nil {
		return fmt.Errorf("GET %s: %w", path, err)
	}
	return nil
}

// scale sets the replicas of a Deployment.
func (k *cluster) scale(ctx context.Context, deployment string, replicas int) error {
	_, err := k.call(ctx, http.MethodPatch, "/apis/apps/v1/namespaces/"+plainNamespace+"/deployments/"+deployment+"/scale",
		"application/merge-patch+json", fmt.Appendf(nil, `{"spec":{"replicas":%d}}`, replicas))
	return err
}

func (k *cluster) call(ctx context.Context, method, path, kind string, body []byte) ([]byte, error) {
	resp, err := k.request(ctx, method, path, kind, body)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	answer, err := io.ReadAll(io.LimitReader(resp.Body, maxListBytes))
	if err != nil {
		return nil, fmt.Errorf("%s %s: %w", method, path, err)
	}
	return answer, nil
}

// maxListBytes is more than any list that a suite asks for.
const maxListBytes = 64 << 20

func (k *cluster) request(ctx context.Context, method, path, kind string, body []byte) (*http.Response, error) {
	req, err := http.NewRequestWithContext(ctx, method, "http://localhost"+path, bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	if kind != "" {
		req.Header.Set("Content-Type", kind)
	}
	resp, err := k.api.Do(req)
	if err != nil {
		return nil, err
	}
	if resp.StatusCode/100 != 2 {
		text, _ := io.ReadAll(io.LimitReader(resp.Body, 1<<10)) // the status says what there is to say
		return nil, errors.Join(fmt.Errorf("%s %s: %s: %s", method, path, resp.Status, text), resp.Body.Close())
	}
	return resp, nil
}

// podAddress waits, by a watch, until the pod of a Deployment has an address.
func (k *cluster) podAddress(ctx context.Context, deployment string) (string, error) {
	resp, err := k.request(ctx, http.MethodGet, "/api/v1/namespaces/"+plainNamespace+"/pods?watch=1&labelSelector=app%3D"+deployment, "", nil)
	if err != nil {
		return "", fmt.Errorf("watch pods of %s: %w", deployment, err)
	}
	defer resp.Body.Close()
	for events := json.NewDecoder(bufio.NewReader(resp.Body)); ; {
		var event struct {
			Object struct {
				Status struct {
					PodIP string `json:"podIP"`
				} `json:"status"`
			} `json:"object"`
		}
		if err := events.Decode(&event); err != nil {
			return "", fmt.Errorf("await the address of a pod of %s: %w", deployment, err)
		}
		if ip := event.Object.Status.PodIP; ip != "" {
			return ip, nil
		}
	}
}

// awaitNoPods waits until nothing is left of a Deployment that was scaled to none.
func (k *cluster) awaitNoPods(ctx context.Context, deployment string) error {
	return poll(ctx, time.Minute, "the end of the pods of "+deployment, func() (bool, error) {
		var pods podList
		err := k.get(ctx, "/api/v1/namespaces/"+plainNamespace+"/pods?labelSelector=app%3D"+deployment, &pods)
		return len(pods.Items) == 0, err
	})
}

// apply has kubectl apply objects.
func (k *cluster) apply(ctx context.Context, objects ...map[string]any) error {
	list, err := json.Marshal(map[string]any{"apiVersion": "v1", "kind": "List", "items": objects})
	if err != nil {
		return fmt.Errorf("encode objects: %w", err)
	}
	return k.run(ctx, list, k.kubectl, "apply", "-f", "-")
}

// push uploads a sample image to the registry that the nodes pull from.
func (k *cluster) push(ctx context.Context, name string) (string, error) {
	return k.o.push(ctx, k.o.Registry, name)
}

// poll calls done until it says so, fails, or time is up.
func poll(ctx context.Context, atMost time.Duration, what string, done func() (bool, error)) error {
	ctx, cancel := context.WithTimeout(ctx, atMost)
	defer cancel()
	for {
		ok, err := done()
		if ok || err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("await %s: %w", what, ctx.Err())
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// run runs a program with a user's environment, and says what it said if it fails.
func (k *cluster) run(ctx context.Context, in []byte, argv ...string) error {
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	cmd.Env = append(os.Environ(), k.env...)
	cmd.Stdin = bytes.NewReader(in)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%s %s: %w: %s", filepath.Base(argv[0]), argv[1], err, strings.TrimSpace(string(out)))
	}
	return nil
}
