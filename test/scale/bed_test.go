package scale_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"connectrpc.com/connect"
	"golang.org/x/sync/errgroup"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/rest"
	ctrlcache "sigs.k8s.io/controller-runtime/pkg/cache"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/envtest"

	"github.com/hearth-serverless/hearth/api/v1alpha1/hearthv1connect"
	"github.com/hearth-serverless/hearth/gateway"
	"github.com/hearth-serverless/hearth/internal/daemon"
	"github.com/hearth-serverless/hearth/internal/host"
	"github.com/hearth-serverless/hearth/internal/kube"
	"github.com/hearth-serverless/hearth/internal/pki"
)

const (
	namespace, system = "hearth", "hearth-system"
	programs          = "../../.cache/tools/kubernetes"
	poolmanager       = "../../bin/poolmanager"
	mergePatch        = types.MergePatchType
	// patience is how long anything may take of which no bound is promised.
	patience = 2 * time.Minute
)

// bed is a control plane with nodes that are simulated, and the daemons that are real.
type bed struct {
	dir        string // in memory
	env        *envtest.Environment
	config     *rest.Config
	kubeconfig string
	api        client.Client
	seen       ctrlcache.Cache
	kubelets   *kubelets
	ledger     *ledger
	prefix     string // of all addresses: loopback's, and this process's
	port       string // that nodeagents and poolmanagers serve on, each on an address of its own
	next       int    // poolmanager's number
	log        *slog.Logger

	mu        sync.Mutex // guards addresses
	addresses []string   // of poolmanagers
}

// newBed starts a control plane of the programs that `make kubernetes` builds, with as many nodes.
func newBed(t *testing.T, nodes int) *bed {
	t.Helper()
	b := &bed{ledger: &ledger{}, log: slog.New(slog.DiscardHandler), prefix: fmt.Sprintf("127.%d", 64+os.Getpid()%128)}
	var err error
	if b.dir, err = os.MkdirTemp(memory(), "hearth-scale-"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(b.dir) })
	b.startControl(t)
	for _, name := range []string{namespace, system} {
		b.must(t, b.api.Create(t.Context(), &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name}}))
	}
	b.must(t, kube.NewCertificates(kube.CertificatesConfig{Client: b.api, Namespace: system}).Ensure(t.Context()))
	b.startScheduler(t)
	b.startNodes(t, nodes)
	return b
}

// memory is a folder in memory, where there is one: etcd must not wait for a disk.
func memory() string {
	if info, err := os.Stat("/dev/shm"); err == nil && info.IsDir() {
		return "/dev/shm"
	}
	return ""
}

func (*bed) must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func (b *bed) startControl(t *testing.T) {
	t.Helper()
	folder, err := filepath.Abs(programs)
	b.must(t, err)
	b.env = &envtest.Environment{
		BinaryAssetsDirectory: folder, Scheme: kube.NewScheme(), ErrorIfCRDPathMissing: true, CRDDirectoryPaths: []string{"../../deploy/crds"},
		ControlPlaneStartTimeout: patience, ControlPlaneStopTimeout: patience,
	}
	b.env.ControlPlane.Etcd = &envtest.Etcd{DataDir: filepath.Join(b.dir, "etcd")}
	b.must(t, os.Mkdir(b.env.ControlPlane.Etcd.DataDir, 0o700))
	b.env.ControlPlane.Etcd.Configure().Append("unsafe-no-fsync", "true").Append("quota-backend-bytes", "2147483648")
	// Nobody takes the taint away that a new node has: there is no controller-manager.
	b.env.ControlPlane.GetAPIServer().Configure().Append("disable-admission-plugins", "TaintNodesByCondition")
	b.config, err = b.env.Start()
	t.Cleanup(func() { _ = b.env.Stop() })
	b.must(t, err)
	b.config.QPS = -1 // what is measured must not wait here
	user, err := b.env.AddUser(envtest.User{Name: "admin", Groups: []string{"system:masters"}}, nil)
	b.must(t, err)
	text, err := user.KubeConfig()
	b.must(t, err)
	b.kubeconfig = filepath.Join(b.dir, "kubeconfig")
	b.must(t, os.WriteFile(b.kubeconfig, text, 0o600))
	b.api, err = client.New(b.config, client.Options{Scheme: kube.NewScheme()})
	b.must(t, err)
	b.seen, err = ctrlcache.New(b.config, ctrlcache.Options{Scheme: kube.NewScheme(), DefaultTransform: ctrlcache.TransformStripManagedFields()})
	b.must(t, err)
}

// background runs something until the test has ended.
func (b *bed) background(t *testing.T, run func(ctx context.Context) error) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	done := make(chan error, 1)
	go func() { done <- run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil && !errors.Is(err, context.Canceled) {
			t.Errorf("in the background: %v", err)
		}
	})
}

func (b *bed) startScheduler(t *testing.T) {
	t.Helper()
	b.process(t, filepath.Join(programs, "kube-scheduler"), "kube-scheduler.log", "--kubeconfig", b.kubeconfig, "--leader-elect=false", "--secure-port=0",
		"--kube-api-qps=200", "--kube-api-burst=400")
}

// process runs a program until the test has ended, or it is killed.
func (b *bed) process(t *testing.T, program, log string, args ...string) *exec.Cmd {
	t.Helper()
	out, err := os.Create(filepath.Join(b.dir, log))
	b.must(t, err)
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("%s ends with\n%s", log, tail(out.Name()))
		}
		_ = out.Close()
	})
	cmd := exec.Command(program, args...)
	cmd.Stdout, cmd.Stderr = out, out
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	b.must(t, cmd.Start())
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait() // it was killed
	})
	return cmd
}

func tail(name string) string {
	text, err := os.ReadFile(name)
	if err != nil {
		return err.Error()
	}
	return string(text[max(0, len(text)-4000):])
}

// startNodes registers nodes, each with a kubelet and a nodeagent of ours.
func (b *bed) startNodes(t *testing.T, count int) {
	t.Helper()
	keys := b.keys(t, "nodeagent")
	b.kubelets = newKubelets(b.api, b.seen)
	b.background(t, b.seen.Start)
	first, err := net.Listen("tcp", b.address(1)+":0")
	b.must(t, err)
	_, b.port, err = net.SplitHostPort(first.Addr().String())
	b.must(t, errors.Join(err, first.Close()))
	for n := range count {
		f := &fakeNode{name: fmt.Sprintf("node-%03d", n), zone: string(rune('a' + n%3)), address: b.address(256 + n)}
		calls, err := daemon.ListenTLS(t.Context(), net.JoinHostPort(f.address, b.port)) // first: the other's port is any that is free
		b.must(t, err)
		functions, err := net.Listen("tcp", f.address+":0")
		b.must(t, err)
		server := answers(functions)
		t.Cleanup(func() { _ = server.Close() })
		f.agent = newAgent(f.name, functions.Addr().String(), b.ledger, b.kubelets.sandbox)
		mux := http.NewServeMux()
		mux.Handle(hearthv1connect.NewNodeServiceHandler(f.agent, connect.WithCompression("gzip", nil, nil))) // as nodeagent
		b.background(t, func(ctx context.Context) error {
			return daemon.ServeTLS(ctx, b.log, calls, keys, mux, pki.Poolmanager, pki.Admin)
		})
		b.kubelets.nodes, b.kubelets.byName[f.name] = append(b.kubelets.nodes, f), f
	}
	b.background(t, b.kubelets.run)
	var all errgroup.Group
	all.SetLimit(8)
	for _, n := range b.kubelets.nodes {
		all.Go(func() error { return b.kubelets.register(t.Context(), n) })
	}
	b.must(t, all.Wait())
	b.await(t, "nodeagents that are ready", func(ctx context.Context) error {
		var pods corev1.PodList
		if err := b.seen.List(ctx, &pods, client.InNamespace(system)); err != nil {
			return err
		}
		ready := 0
		for _, p := range pods.Items {
			if p.Status.Phase == corev1.PodRunning {
				ready++
			}
		}
		return want("pods of nodeagent", ready, count)
	})
}

func want(what string, is, should int) error {
	if is != should {
		return fmt.Errorf("%d %s, not %d", is, what, should)
	}
	return nil
}

// address is one of the machine's own.
func (b *bed) address(n int) string { return fmt.Sprintf("%s.%d.%d", b.prefix, n>>8, n&0xff) }

// keys are what a daemon finds in the Secret that it mounts.
func (b *bed) keys(t *testing.T, identity string) *pki.Dir {
	t.Helper()
	var secret corev1.Secret
	b.must(t, b.api.Get(t.Context(), client.ObjectKey{Namespace: system, Name: "hearth-tls-" + identity}, &secret))
	dir := filepath.Join(b.dir, identity)
	b.must(t, os.Mkdir(dir, 0o700))
	for name, data := range secret.Data {
		b.must(t, os.WriteFile(filepath.Join(dir, name), data, 0o600))
	}
	keys, err := pki.OpenDir(dir, b.log)
	b.must(t, err)
	return keys
}

// manager is a poolmanager's process.
type manager struct {
	*exec.Cmd
	address, socket, log string
	admin                *http.Client
}

// startManager starts one more poolmanager.
func (b *bed) startManager(t *testing.T) *manager {
	t.Helper()
	b.next++
	m := &manager{address: net.JoinHostPort(b.address(b.next), b.port), socket: filepath.Join(b.dir, fmt.Sprintf("pool-%d.sock", b.next))}
	admin := filepath.Join(b.dir, fmt.Sprintf("admin-%d.sock", b.next))
	m.log = filepath.Join(b.dir, fmt.Sprintf("poolmanager-%d.log", b.next))
	m.Cmd = b.process(t, poolmanager, filepath.Base(m.log), "--kubernetes", "--kubeconfig", b.kubeconfig, "--namespace", namespace, "--lease-namespace", system,
		"--rpc-address", m.address, "--rpc-socket", m.socket, "--admin-address", "unix:"+admin, "--tls-dir", filepath.Join(b.dir, fmt.Sprintf("tls-%d", b.next)), "--node-port", b.port)
	m.admin = &http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", admin)
	}}}
	b.mu.Lock()
	b.addresses = append(b.addresses, m.address)
	b.mu.Unlock()
	b.await(t, "a poolmanager that serves", func(ctx context.Context) error { _, err := m.get(ctx, "/readyz"); return err })
	return m
}

// began is when it began to lead, as its log says.
func (m *manager) began(t *testing.T) time.Time {
	t.Helper()
	text, err := os.ReadFile(m.log)
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(text)) {
		stamp, rest, _ := strings.Cut(strings.TrimPrefix(line, "time="), " ")
		if at, err := time.Parse(time.RFC3339Nano, stamp); err == nil && strings.Contains(rest, "msg=leading") {
			return at
		}
	}
	t.Fatalf("%s does not say that it leads", m.log)
	return time.Time{}
}

func (m *manager) get(ctx context.Context, path string) (string, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://hearth"+path, nil)
	if err != nil {
		return "", err
	}
	resp, err := m.admin.Do(req)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s: %.200s", resp.Status, body)
	}
	return string(body), err
}

// peak is the most memory that the process has had, in bytes, and cpu what it has used.
func (m *manager) usage(t *testing.T) (peak int, cpu time.Duration) {
	t.Helper()
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", m.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(status)) {
		if f := strings.Fields(line); f[0] == "VmHWM:" {
			peak, _ = strconv.Atoi(f[1])
		}
	}
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", m.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	f := strings.Fields(string(stat[strings.LastIndexByte(string(stat), ')')+2:]))
	user, _ := strconv.Atoi(f[11])
	kernel, _ := strconv.Atoi(f[12])
	return peak << 10, time.Duration(user+kernel) * 10 * time.Millisecond // a tick is 10 ms on every Linux that there is
}

// profile keeps what pprof says, in the folder that $HEARTH_PROFILES names.
func (m *manager) profile(t *testing.T, name, path string) {
	t.Helper()
	dir := os.Getenv("HEARTH_PROFILES")
	if dir == "" {
		return
	}
	text, err := m.get(t.Context(), "/debug/pprof/"+path)
	if err == nil {
		err = os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600)
	}
	if err != nil {
		t.Log(err)
	}
}

// sample reads the lines of a Prometheus exposition.
func samples(text string, each func(name, labels string, value float64)) {
	lines := bufio.NewScanner(strings.NewReader(text))
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		line := lines.Text()
		at := strings.LastIndexByte(line, ' ')
		if at < 0 || line[0] == '#' {
			continue
		}
		value, err := strconv.ParseFloat(line[at+1:], 64)
		if err != nil {
			continue
		}
		name, labels, _ := strings.Cut(line[:at], "{")
		each(name, strings.TrimSuffix(labels, "}"), value)
	}
}

// histogram is the count of all below each bound.
func (m *manager) histogram(t *testing.T, name string) map[string]float64 {
	t.Helper()
	text, err := m.get(t.Context(), "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]float64{}
	samples(text, func(n, labels string, v float64) {
		if bound, ok := strings.CutPrefix(labels, `le="`); ok && n == name+"_bucket" {
			out[strings.TrimSuffix(bound, `"`)] = v
		}
	})
	return out
}

// writes are what was written to the API server so far, by verb and resource.
func (b *bed) writes(t *testing.T) map[string]float64 {
	t.Helper()
	http1, err := rest.HTTPClientFor(b.config)
	b.must(t, err)
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, strings.TrimSuffix(b.config.Host, "/")+"/metrics", nil)
	b.must(t, err)
	resp, err := http1.Do(req)
	b.must(t, err)
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	b.must(t, err)
	if resp.StatusCode != http.StatusOK {
		t.Fatalf("%s: %.300s", resp.Status, text)
	}
	out := map[string]float64{}
	samples(string(text), func(name, labels string, v float64) {
		if name != "apiserver_request_total" {
			return
		}
		l := map[string]string{}
		for part := range strings.SplitSeq(labels, ",") {
			k, value, _ := strings.Cut(part, "=")
			l[k] = strings.Trim(value, `"`)
		}
		if l["verb"] != "GET" && l["verb"] != "LIST" && l["verb"] != "WATCH" {
			out[strings.TrimSuffix(l["verb"]+" "+l["resource"]+"/"+l["subresource"], "/")] += v
		}
	})
	return out
}

// startGateway serves Functions in this process, as cmd/gateway does on a network of several poolmanagers.
func (b *bed) startGateway(t *testing.T) (url string) {
	t.Helper()
	keys := b.keys(t, "gateway")
	l, err := net.Listen("tcp", b.address(1<<8-1)+":0")
	b.must(t, err)
	log, err := os.Create(filepath.Join(b.dir, "gateway.log"))
	b.must(t, err)
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("gateway.log ends with\n%s", tail(log.Name()))
		}
		_ = log.Close()
	})
	logger := slog.New(slog.NewTextHandler(log, nil))
	g, err := gateway.New(gateway.Config{Name: "gateway", Logger: logger, Patience: gateway.NetworkPatience, Pool: gateway.NewLeader(gateway.LeaderConfig{
		Logger:  logger,
		Resolve: func(context.Context) ([]string, error) { return b.managers(), nil },
		Connect: func(address string) (gateway.Pool, func()) {
			c := daemon.TLSClient(keys, pki.Poolmanager, address)
			return gateway.NewRemote(c, "http://hearth"), c.CloseIdleConnections
		},
	})})
	b.must(t, err)
	b.background(t, func(ctx context.Context) error { return g.Run(ctx, l) })
	select {
	case <-g.Synced():
	case <-time.After(patience):
		t.Fatal("poolmanager has told the gateway nothing")
	}
	return "http://" + l.Addr().String() + "/fn/"
}

// managers are the addresses of all poolmanagers.
func (b *bed) managers() []string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return slices.Clone(b.addresses)
}

// leads says in which term a poolmanager leads, or 0 if it is a standby.
func (m *manager) leads(ctx context.Context) (epoch int64) {
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	text, err := m.get(ctx, "/metrics")
	if err != nil {
		return 0
	}
	samples(text, func(name, _ string, v float64) {
		if name == "hearth_pool_epoch" {
			epoch = int64(v)
		}
	})
	return epoch
}

// await tries until there is no error.
func (b *bed) await(t *testing.T, what string, try func(ctx context.Context) error) {
	t.Helper()
	b.awaitFor(t, patience, what, try)
}

func (b *bed) awaitFor(t *testing.T, most time.Duration, what string, try func(ctx context.Context) error) time.Duration {
	t.Helper()
	begun := time.Now()
	ctx, cancel := context.WithTimeout(t.Context(), most)
	defer cancel()
	for {
		err := try(ctx)
		if err == nil {
			return time.Since(begun)
		}
		if !host.Pause(ctx, 250*time.Millisecond) {
			t.Fatalf("await %s for %v: %v", what, most, err)
		}
	}
}
