package instance

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
)

// usage tells, when it is asked, what each Instance takes that holds a Revision, whether it has its pod for itself or not. There
// are as many series as such Instances on the node.
type usage struct {
	e           *Engine
	memory, cpu *prometheus.Desc
}

func newUsage(e *Engine) *usage {
	labels := []string{"function", "instance", "pod"}
	return &usage{e,
		prometheus.NewDesc("hearth_instance_memory_bytes", "Memory that an instance uses, without files that it has only read.", labels, nil),
		prometheus.NewDesc("hearth_instance_cpu_seconds_total", "Processor time that an instance has taken.", labels, nil)}
}

// Describe is prometheus.Collector's.
func (u *usage) Describe(out chan<- *prometheus.Desc) { out <- u.memory; out <- u.cpu }

// Collect is prometheus.Collector's. An Instance that ends meanwhile has nothing to tell.
func (u *usage) Collect(out chan<- prometheus.Metric) {
	for _, i := range u.e.all() {
		i.mu.Lock()
		state, function := i.state, i.revision.GetFunction()
		i.mu.Unlock()
		if function == "" || state < hearthv1.State_STATE_SERVING || state > hearthv1.State_STATE_FROZEN {
			continue
		}
		if bytes, err := u.e.cgroups.memory(i.place()); err == nil {
			out <- prometheus.MustNewConstMetric(u.memory, prometheus.GaugeValue, float64(bytes), function, i.id, i.pod.id)
		}
		if took, err := u.e.cgroups.cpu(i.place()); err == nil {
			out <- prometheus.MustNewConstMetric(u.cpu, prometheus.CounterValue, took.Seconds(), function, i.id, i.pod.id)
		}
	}
}

// cpu is the processor time that a Function has taken.
func (c cgroups) cpu(m member) (time.Duration, error) {
	text, err := os.ReadFile(c.file(m, "cpuacct", "cpuacct.usage", "cpu.stat"))
	if err != nil {
		return 0, fmt.Errorf("processor time of %s: %w", m.id, err)
	}
	if c.unified() {
		return time.Duration(number(text, "usage_usec")) * time.Microsecond, nil
	}
	ns, err := strconv.ParseInt(strings.TrimSpace(string(text)), 10, 64)
	if err != nil {
		return 0, fmt.Errorf("processor time of %s: %w", m.id, err)
	}
	return time.Duration(ns), nil
}
