package e2e

import (
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
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/yaml"

	"github.com/hearth-serverless/hearth/deploy"
)

// PrometheusConfig says what a Prometheus scrapes.
type PrometheusConfig struct {
	// Cache keeps the program: Debian's package, unpacked and not installed. It is fetched when it is not there.
	Cache string
	// Dir is an empty folder for what it measures.
	Dir string
	// Pods lists the daemons' pods as JSON, as `kubectl -n hearth-system get pods -o json` prints them; it is called again and again, for
	// pods come and go. Debian's Prometheus cannot ask an API server itself. This machine has to reach the pods' addresses.
	Pods func(context.Context) ([]byte, error)
	// Interval between scrapes, and between lists of pods; default 1 s, because a test does not last.
	Interval time.Duration
}

// Prometheus that runs.
type Prometheus struct {
	URL string

	command *exec.Cmd
	stop    context.CancelFunc // of the list of pods
	listed  chan error         // why the last list of pods failed, once it is over
	ended   chan struct{}      // closed when the program has ended
	err     error              // of the program; to be read when ended is closed
	log     *tail
}

// StartPrometheus starts one on a free port of loopback and waits until it is ready, with the rules of deploy/ and the labels that
// deploy/'s configuration gives to what is scraped. Close it.
func StartPrometheus(ctx context.Context, c PrometheusConfig) (*Prometheus, error) {
	p, err := startPrometheus(ctx, c)
	if err != nil {
		return nil, fmt.Errorf("start a Prometheus: %w", err)
	}
	return p, nil
}

func startPrometheus(ctx context.Context, c PrometheusConfig) (*Prometheus, error) {
	program, err := prometheusProgram(ctx, c.Cache)
	if err != nil {
		return nil, err
	}
	if program, err = filepath.Abs(program); err != nil {
		return nil, err
	}
	if c.Interval == 0 {
		c.Interval = time.Second
	}
	if err := errors.Join(c.write(), c.list(ctx)); err != nil {
		return nil, err
	}
	// Prometheus cannot be told to take a free port and say which. Another may take this one meanwhile: then it ends, and another is tried.
	for try := 1; ; try++ {
		address, err := freeAddress()
		if err != nil {
			return nil, err
		}
		p, err := c.run(ctx, program, address)
		if err == nil || try == 3 || !strings.Contains(err.Error(), "address already in use") {
			return p, err
		}
	}
}

func freeAddress() (string, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	return l.Addr().String(), l.Close()
}

// prometheusProgram is the one in the cache.
func prometheusProgram(ctx context.Context, cache string) (string, error) {
	dir := filepath.Join(cache, "prometheus")
	program := filepath.Join(dir, "usr", "bin", "prometheus")
	if _, err := os.Stat(program); err == nil {
		return program, nil
	}
	if err := os.MkdirAll(cache, 0o755); err != nil {
		return "", err
	}
	work, err := os.MkdirTemp(cache, ".prometheus-")
	if err != nil {
		return "", err
	}
	defer func() { _ = os.RemoveAll(work) }()
	command := exec.CommandContext(ctx, "/bin/sh", "-euc", "apt-get download -qq prometheus >&2; dpkg -x prometheus_*.deb unpacked")
	command.Dir = work
	if out, err := command.CombinedOutput(); err != nil {
		return "", fmt.Errorf("fetch Debian's package prometheus: %w; it said: %s", err, out)
	}
	// Who comes second finds it there, and keeps that.
	if err := os.Rename(filepath.Join(work, "unpacked"), dir); err != nil && !errors.Is(err, syscall.ENOTEMPTY) && !errors.Is(err, os.ErrExist) {
		return "", err
	}
	_, err = os.Stat(program)
	return program, err
}

const targetsFile = "targets.json"

// write writes the configuration and deploy/'s rules.
func (c PrometheusConfig) write() error {
	interval := c.Interval.String()
	config, err := yaml.Marshal(map[string]any{
		"global":     map[string]any{"scrape_interval": interval, "evaluation_interval": interval},
		"rule_files": []string{"alerts.yaml"},
		"scrape_configs": []any{map[string]any{
			"job_name": "hearth", "file_sd_configs": []any{map[string]any{"files": []string{targetsFile}, "refresh_interval": interval}},
		}},
	})
	if err != nil {
		return err
	}
	rules, err := deploy.Seen.ReadFile("prometheus/alerts.yaml")
	return errors.Join(err, os.WriteFile(filepath.Join(c.Dir, "prometheus.yaml"), config, 0o600), os.WriteFile(filepath.Join(c.Dir, "alerts.yaml"), rules, 0o600))
}

// list writes down what is to be scraped now.
func (c PrometheusConfig) list(ctx context.Context) error {
	pods, err := c.Pods(ctx)
	if err != nil {
		return fmt.Errorf("list the daemons' pods: %w", err)
	}
	targets, err := Targets(pods)
	if err != nil {
		return err
	}
	text, err := json.Marshal(targets)
	if err != nil {
		return err
	}
	name := filepath.Join(c.Dir, targetsFile)
	if err := os.WriteFile(name+".new", text, 0o600); err != nil {
		return err
	}
	return os.Rename(name+".new", name)
}

// follow lists pods until ctx is done, and says why the last list failed, if it did: while an API server is away the old list serves.
func (c PrometheusConfig) follow(ctx context.Context) (err error) {
	for {
		select {
		case <-ctx.Done():
			return err
		case <-time.After(c.Interval):
		}
		if failed := c.list(ctx); ctx.Err() == nil {
			err = failed
		}
	}
}

// Target is what Prometheus reads from a file about something to scrape.
type Target struct {
	Targets []string          `json:"targets"`
	Labels  map[string]string `json:"labels"`
}

// Targets are what deploy/prometheus/prometheus.yaml has a Prometheus find among pods (a PodList in JSON).
func Targets(list []byte) ([]Target, error) {
	var pods corev1.PodList
	if err := json.Unmarshal(list, &pods); err != nil {
		return nil, fmt.Errorf("the daemons' pods: %w", err)
	}
	targets := []Target{}
	for _, p := range pods.Items {
		if p.Labels["app.kubernetes.io/name"] != "hearth" || p.Status.PodIP == "" || p.Status.Phase == corev1.PodSucceeded || p.Status.Phase == corev1.PodFailed {
			continue
		}
		for _, c := range p.Spec.Containers {
			for _, port := range c.Ports {
				if port.Name != "metrics" {
					continue
				}
				targets = append(targets, Target{
					[]string{net.JoinHostPort(p.Status.PodIP, strconv.Itoa(int(port.ContainerPort)))},
					map[string]string{"component": p.Labels["app.kubernetes.io/component"], "node": p.Spec.NodeName, "pod": p.Name},
				})
			}
		}
	}
	return targets, nil
}

func (c PrometheusConfig) run(ctx context.Context, program, address string) (*Prometheus, error) {
	p := &Prometheus{URL: "http://" + address, ended: make(chan struct{}), log: &tail{}}
	p.command = exec.Command(program, "--config.file="+filepath.Join(c.Dir, "prometheus.yaml"), "--storage.tsdb.path="+filepath.Join(c.Dir, "data"),
		"--web.listen-address="+address, "--log.level=warn")
	p.command.Dir, p.command.Stdout, p.command.Stderr = c.Dir, p.log, p.log
	p.command.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // Ctrl-C is for us, who close it
	if err := p.command.Start(); err != nil {
		return nil, err
	}
	go func() {
		p.err = p.command.Wait()
		close(p.ended)
	}()
	following, stop := context.WithCancel(context.WithoutCancel(ctx))
	p.stop, p.listed = stop, make(chan error, 1)
	go func() { p.listed <- c.follow(following) }()
	if err := p.await(ctx); err != nil {
		return nil, errors.Join(err, p.Close())
	}
	return p, nil
}

// await waits until it is ready, for a minute at most.
func (p *Prometheus) await(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	for {
		if p.ready(ctx) {
			return nil
		}
		select {
		case <-p.ended:
			return fmt.Errorf("it ended: %w; it said: %s", p.err, p.log)
		case <-ctx.Done():
			return fmt.Errorf("it is not ready: %w; it said: %s", ctx.Err(), p.log)
		case <-time.After(100 * time.Millisecond):
		}
	}
}

func (p *Prometheus) ready(ctx context.Context) bool {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, p.URL+"/-/ready", nil)
	if err != nil {
		return false
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return false
	}
	defer resp.Body.Close()
	_, _ = io.Copy(io.Discard, io.LimitReader(resp.Body, 1<<10))
	return resp.StatusCode == http.StatusOK
}

// Close ends it. What it measured stays in its folder. It is an error if the last list of pods failed.
func (p *Prometheus) Close() error {
	p.stop()
	return errors.Join(<-p.listed, p.end())
}

func (p *Prometheus) end() error {
	_ = p.command.Process.Signal(syscall.SIGTERM)
	select {
	case <-p.ended:
		return nil
	case <-time.After(15 * time.Second):
	}
	err := p.command.Process.Kill()
	<-p.ended
	return errors.Join(err, errors.New("the Prometheus did not end within 15s, and was killed"))
}

// tail keeps the end of what is written to it.
type tail struct {
	mu   sync.Mutex // guards text
	text []byte
}

const tailBytes = 4 << 10

func (t *tail) Write(b []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.text = append(t.text, b...)
	t.text = t.text[max(0, len(t.text)-tailBytes):]
	return len(b), nil
}

func (t *tail) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return string(t.text)
}
