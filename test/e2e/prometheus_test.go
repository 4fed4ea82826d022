package e2e_test

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"github.com/prometheus/common/model"
	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/model/relabel"
	"go.yaml.in/yaml/v2"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/hearth-serverless/hearth/deploy"
	"github.com/hearth-serverless/hearth/test/e2e"
)

// cache is the project's, if a Prometheus is in it.
func cache(t *testing.T) string {
	t.Helper()
	dir := filepath.Join("..", "..", ".cache")
	if _, err := os.Stat(filepath.Join(dir, "prometheus", "usr", "bin", "prometheus")); err != nil {
		t.Skipf("%v: `make e2e` fetches it", err)
	}
	return dir
}

// pods are a daemon's, one that has ended, and somebody else's, all at an address.
func pods(t *testing.T, address string) []byte {
	host, port, err := net.SplitHostPort(address)
	if err != nil {
		t.Fatal(err)
	}
	number, err := strconv.Atoi(port)
	if err != nil {
		t.Fatal(err)
	}
	pod := func(name, app string, phase corev1.PodPhase) corev1.Pod {
		return corev1.Pod{
			ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{"app.kubernetes.io/name": app, "app.kubernetes.io/component": "gateway"}},
			Spec: corev1.PodSpec{NodeName: "node-1", Containers: []corev1.Container{{Name: "c", Ports: []corev1.ContainerPort{
				{Name: "http", ContainerPort: 1}, {Name: "metrics", ContainerPort: int32(number)},
			}}, {Name: "holder"}}},
			Status: corev1.PodStatus{Phase: phase, PodIP: host},
		}
	}
	list, err := json.Marshal(corev1.PodList{Items: []corev1.Pod{
		pod("gateway-1", "hearth", corev1.PodRunning), pod("gateway-2", "hearth", corev1.PodFailed), pod("other", "other", corev1.PodRunning),
	}})
	if err != nil {
		t.Fatal(err)
	}
	return list
}

// TestTargetsAreTheConfigurations holds what is found for a test beside what deploy/'s configuration finds, by Prometheus's own code.
func TestTargetsAreTheConfigurations(t *testing.T) {
	text, err := deploy.Seen.ReadFile("prometheus/prometheus.yaml")
	if err != nil {
		t.Fatal(err)
	}
	var config struct {
		ScrapeConfigs []struct {
			JobName string            `yaml:"job_name"`
			Relabel []*relabel.Config `yaml:"relabel_configs"`
		} `yaml:"scrape_configs"`
	}
	if err := yaml.Unmarshal(text, &config); err != nil {
		t.Fatal(err)
	}
	if len(config.ScrapeConfigs) != 1 || config.ScrapeConfigs[0].JobName != "hearth" {
		t.Fatalf("%+v", config)
	}
	for _, r := range config.ScrapeConfigs[0].Relabel {
		if err := r.Validate(model.UTF8Validation); err != nil {
			t.Fatal(err)
		}
	}
	var list corev1.PodList
	if err := json.Unmarshal(pods(t, "10.0.0.1:7445"), &list); err != nil {
		t.Fatal(err)
	}
	var want []e2e.Target
	for _, p := range list.Items {
		for _, c := range p.Spec.Containers {
			for _, port := range append(c.Ports, corev1.ContainerPort{}) { // a container without ports is found too
				found := labels.NewBuilder(labels.FromMap(map[string]string{
					"__address__":                                             net.JoinHostPort(p.Status.PodIP, strconv.Itoa(int(port.ContainerPort))),
					"__meta_kubernetes_pod_name":                              p.Name,
					"__meta_kubernetes_pod_phase":                             string(p.Status.Phase),
					"__meta_kubernetes_pod_node_name":                         p.Spec.NodeName,
					"__meta_kubernetes_pod_container_port_name":               port.Name,
					"__meta_kubernetes_pod_label_app_kubernetes_io_name":      p.Labels["app.kubernetes.io/name"],
					"__meta_kubernetes_pod_label_app_kubernetes_io_component": p.Labels["app.kubernetes.io/component"],
				}))
				if !relabel.ProcessBuilder(found, config.ScrapeConfigs[0].Relabel...) {
					continue
				}
				target := e2e.Target{Targets: []string{found.Get("__address__")}, Labels: map[string]string{}}
				found.Range(func(l labels.Label) {
					if !strings.HasPrefix(l.Name, "__") {
						target.Labels[l.Name] = l.Value
					}
				})
				want = append(want, target)
			}
		}
	}
	got, err := e2e.Targets(pods(t, "10.0.0.1:7445"))
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, got); diff != "" || len(got) != 1 {
		t.Error(diff)
	}
	if _, err := e2e.Targets([]byte("Error from server")); err == nil {
		t.Error("takes what is no list")
	}
}

// TestPrometheus has a real one find daemons as deploy/ tells it to, scrape them and answer.
func TestPrometheus(t *testing.T) {
	cache := cache(t)
	registry := prometheus.NewRegistry()
	promauto.With(registry).NewCounterVec(prometheus.CounterOpts{Name: "hearth_gateway_requests_total"}, []string{"function", "code"}).WithLabelValues("f", "200").Inc()
	daemon := httptest.NewServer(promhttp.HandlerFor(registry, promhttp.HandlerOpts{}))
	defer daemon.Close()
	p, err := e2e.StartPrometheus(t.Context(), e2e.PrometheusConfig{
		Cache: cache, Dir: t.TempDir(), Interval: 100 * time.Millisecond,
		Pods: func(context.Context) ([]byte, error) { return pods(t, strings.TrimPrefix(daemon.URL, "http://")), nil },
	})
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := p.Close(); err != nil {
			t.Error(err)
		}
	}()
	for query, want := range map[string]int{
		`up{job="hearth", component="gateway", node="node-1", pod="gateway-1"} == 1`: 1,
		`up{pod!="gateway-1"}`: 0,
		`sum by (function) (rate(hearth_gateway_requests_total{job="hearth", component="gateway"}[1m]))`: 1,
	} {
		if err := eventually(t, func() error {
			n, err := e2e.Ask(t.Context(), p.URL, query)
			if err == nil && n != want {
				err = fmt.Errorf("%d numbers, want %d", n, want)
			}
			return err
		}); err != nil {
			t.Errorf("%s: %v", query, err)
		}
	}
	// The daemon tells but one metric, so most panels are empty. None is refused.
	err = e2e.RunQueries(t.Context(), p.URL, time.Minute)
	if err == nil || !strings.Contains(err.Error(), "coldstarts.json, Thawing is empty") || strings.Contains(err.Error(), "refused") || strings.Contains(err.Error(), "overview.json, Requests is empty") {
		t.Errorf("queries of a Prometheus that knows little: %v", err)
	}
}

// eventually tries for a minute.
func eventually(t *testing.T, try func() error) error {
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	for {
		err := try()
		if err == nil || ctx.Err() != nil {
			return err
		}
		select {
		case <-ctx.Done():
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// TestRulesArePrometheuses has Prometheus's own tool look at the rules.
func TestRulesArePrometheuses(t *testing.T) {
	tool := filepath.Join(cache(t), "prometheus", "usr", "bin", "promtool")
	rules := filepath.Join("..", "..", "deploy", "prometheus", "alerts.yaml")
	if out, err := exec.Command(tool, "check", "rules", rules).CombinedOutput(); err != nil {
		t.Errorf("%v: %s", err, out)
	}
}

func TestPrometheusThatDoesNotStart(t *testing.T) {
	cache := t.TempDir()
	program := filepath.Join(cache, "prometheus", "usr", "bin", "prometheus")
	if err := os.MkdirAll(filepath.Dir(program), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(program, []byte("#!/bin/sh\necho it does not like this >&2\nexit 3\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	_, err := e2e.StartPrometheus(t.Context(), e2e.PrometheusConfig{Cache: cache, Dir: t.TempDir(), Pods: func(context.Context) ([]byte, error) { return []byte("{}"), nil }})
	if err == nil || !strings.Contains(err.Error(), "exit status 3") || !strings.Contains(err.Error(), "it does not like this") {
		t.Errorf("error %v", err)
	}
}
