package scaler_test

import (
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
	"github.com/hearth-serverless/hearth/scaler"
)

var t0 = time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)

func TestDecide(t *testing.T) {
	type o = scaler.Observation
	silent := scaler.State{SilentSince: t0.Add(-29 * time.Second)}
	over := scaler.State{SilentSince: t0.Add(-30 * time.Second)}
	for _, c := range []struct {
		name    string
		scaling *hearthv1.Scaling
		s       scaler.State
		o       o
		want    int
		reason  string
	}{
		{"nothing known", nil, scaler.State{}, o{}, 0, ""},
		{"first request, its gateway claims", nil, scaler.State{}, o{Now: 1}, 0, "claims one"},
		{"first request, claimed", nil, scaler.State{}, o{Now: 1, Starting: 1}, 1, "here now"},
		{"average", nil, scaler.State{}, o{Average: 14.1, Recent: 14, Peak: 14.1, Covered: 1, Ready: 3}, 3, "average"},
		{"one more than fits", nil, scaler.State{}, o{Average: 14.1, Recent: 14, Peak: 14.1, Covered: 1, Ready: 2}, 3, "average"},
		{"concurrency of one is one each", &hearthv1.Scaling{Concurrency: 1}, scaler.State{}, o{Average: 3, Recent: 3, Peak: 3, Covered: 1, Ready: 3}, 3, ""},
		{"surge", nil, scaler.State{}, o{Average: 1, Recent: 35, Peak: 35, Covered: 1, Ready: 1}, 5, "last seconds"},
		{"no surge while the ready bear it", nil, scaler.State{}, o{Average: 1, Recent: 7, Peak: 7, Covered: 1, Ready: 1}, 1, ""},
		{"missing samples hold", nil, scaler.State{}, o{Average: 0, Covered: 0.5, Ready: 4, Starting: 1}, 5, "held"},
		{"missing samples do not keep from growing", nil, scaler.State{}, o{Average: 70, Recent: 70, Peak: 70, Covered: 0.01, Ready: 4}, 10, ""},
		{"no gateway at all holds", nil, over, o{Ready: 2}, 2, "held"},
		{"peak keeps", nil, scaler.State{}, o{Average: 1, Peak: 25, Covered: 1, Ready: 4}, 3, "busiest second"},
		{"silent, grace begins", nil, scaler.State{}, o{Covered: 1, Ready: 3}, 1, "stays"},
		{"silent, within grace", nil, silent, o{Covered: 1, Ready: 1}, 1, "stays"},
		{"silent, grace over", nil, over, o{Covered: 1, Ready: 1}, 0, "no request"},
		{"not silent any more", nil, over, o{Covered: 1, Ready: 1, Now: 1}, 1, ""},
		{"without grace", &hearthv1.Scaling{Grace: seconds(0)}, scaler.State{}, o{Covered: 1, Ready: 1}, 0, ""},
		{"released stays released", nil, scaler.State{}, o{Average: 14.1, Recent: 14, Peak: 14.1, Covered: 1}, 0, "no instance"},
		{"released keeps its minimum", &hearthv1.Scaling{Min: 2}, scaler.State{}, o{Average: 1, Covered: 1}, 2, "minimum"},
		{"minimum", &hearthv1.Scaling{Min: 2}, over, o{Covered: 1, Ready: 2}, 2, "minimum"},
		{"maximum", &hearthv1.Scaling{Max: 4}, scaler.State{}, o{Average: 1000, Recent: 1000, Peak: 1000, Covered: 1, Ready: 1}, 4, "maximum"},
	} {
		t.Run(c.name, func(t *testing.T) {
			d, _ := scaler.Decide(t0, scaler.PolicyOf(c.scaling), c.s, c.o)
			if d.Desired != c.want || !strings.Contains(d.Reason, c.reason) || d.Reason == "" {
				t.Errorf("%+v, want %d %q", d, c.want, c.reason)
			}
		})
	}
}

func TestPolicyDefaults(t *testing.T) {
	p := scaler.PolicyOf(nil)
	if p.Concurrency != 10 || p.Max != 10 || p.Min != 0 || p.Window != time.Minute || p.Grace != 30*time.Second || p.Utilisation != 0.7 {
		t.Errorf("%+v", p)
	}
}

func chance(r *rand.Rand) (scaler.Policy, scaler.State, scaler.Observation) {
	p := scaler.PolicyOf(&hearthv1.Scaling{Concurrency: int32(r.IntN(20)), Min: int32(r.IntN(3)), Max: int32(r.IntN(30))})
	p.Utilisation = 0.1 + 0.9*r.Float64()
	o := scaler.Observation{Average: r.ExpFloat64() * 20, Recent: r.ExpFloat64() * 20, Now: r.IntN(50), Covered: r.Float64() * 1.2,
		Ready: r.IntN(12), Starting: r.IntN(4)}
	if r.IntN(3) == 0 {
		o.Average, o.Recent, o.Now = 0, 0, 0
	}
	o.Peak = max(o.Average, o.Recent) * (1 + r.Float64())
	s := scaler.State{}
	if r.IntN(2) == 0 {
		s.SilentSince = t0.Add(-time.Duration(r.IntN(60)) * time.Second)
	}
	return p, s, o
}

func TestDecideProperties(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 1))
	for range 50_000 {
		p, s, o := chance(r)
		d, _ := scaler.Decide(t0, p, s, o)
		have := min(o.Ready+o.Starting, p.Max)
		if d.Desired < p.Min || d.Desired > p.Max {
			t.Fatalf("%+v %+v: %+v is out of bounds", p, o, d)
		}
		if o.Covered < 0.9 && d.Desired < have {
			t.Fatalf("%+v %+v: %+v shrinks though samples are missing", p, o, d)
		}
		if have > 0 && (o.Now > 0 || o.Recent > 0 || o.Average > 0) && d.Desired == 0 {
			t.Fatalf("%+v %+v: %+v is zero under load", p, o, d)
		}
		more := o
		more.Average, more.Recent, more.Peak, more.Now = o.Average*1.5, o.Recent*1.5, o.Peak*1.5, o.Now+1
		if e, _ := scaler.Decide(t0, p, s, more); e.Desired < d.Desired {
			t.Fatalf("%+v %+v: more load wants %d, less %d", p, o, e.Desired, d.Desired)
		}
		again, _ := scaler.Decide(t0, p, s, o)
		if again != d {
			t.Fatal("the same question has two answers")
		}
	}
}

func TestWindow(t *testing.T) {
	w := scaler.NewWindow(10 * time.Second)
	if w.Width() != 10*time.Second {
		t.Errorf("width %s", w.Width())
	}
	for _, c := range []time.Duration{0, time.Nanosecond, 100 * time.Hour, -5} {
		if got := scaler.NewWindow(c).Width(); got < time.Second || got > time.Hour {
			t.Errorf("width of %s is %s", c, got)
		}
	}
}
