package v1alpha1

import (
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// Function is what a user deploys: an image, or code for a Runtime. It serves at its URL, from no Instance at all up to scaling.max.
//
// There is no scale subresource: the number of Instances follows the requests, and spec.scaling bounds it.
//
// +kubebuilder:object:root=true
// +kubebuilder:subresource:status
// +kubebuilder:resource:shortName=fn,categories=hearth
// +kubebuilder:printcolumn:name="Ready",type=string,JSONPath=`.status.conditions[?(@.type=="Ready")].status`
// +kubebuilder:printcolumn:name="Reason",type=string,JSONPath=`.status.conditions[?(@.type=="Ready")].reason`
// +kubebuilder:printcolumn:name="Instances",type=integer,JSONPath=`.status.ready`
// +kubebuilder:printcolumn:name="Desired",type=integer,JSONPath=`.status.desired`
// +kubebuilder:printcolumn:name="Revision",type=string,JSONPath=`.status.latestRevision`
// +kubebuilder:printcolumn:name="URL",type=string,JSONPath=`.status.url`
// +kubebuilder:printcolumn:name="Scaling",type=string,priority=1,JSONPath=`.status.reason`
// +kubebuilder:printcolumn:name="Age",type=date,JSONPath=`.metadata.creationTimestamp`
// +kubebuilder:validation:XValidation:rule="self.metadata.name.matches('^[a-z0-9]([-a-z0-9]{0,38}[a-z0-9])?$')",message="metadata.name: must be a DNS label (a-z, 0-9 and -) of at most 40 bytes; for example hello-2"
type Function struct {
	metav1.TypeMeta `json:",inline"`
	// +optional
	metav1.ObjectMeta `json:"metadata,omitempty"`
	// Spec is what the user wants: either image, or runtime and code.
	// +required
	Spec FunctionSpec `json:"spec"`
	// Status is what Hearth says of it.
	// +optional
	Status FunctionStatus `json:"status,omitempty"`
}

// FunctionSpec is what the user wants: either image, or runtime and code.
//
// +kubebuilder:validation:XValidation:rule="has(self.image) != (has(self.runtime) || has(self.code))",message="a function is either an image, or a runtime with code, and not both; for example image: registry.example/hello:1"
// +kubebuilder:validation:XValidation:rule="has(self.runtime) == has(self.code)",message="runtime and code belong together; for example runtime: python, code: {package: registry.example/code/hello@sha256:…, handler: main.hello}"
// +kubebuilder:validation:XValidation:rule="!has(self.runtime) || ((!has(self.command) || self.command.size() == 0) && (!has(self.args) || self.args.size() == 0))",message="command and args belong to an image; in a runtime code.handler says what runs"
// +kubebuilder:validation:XValidation:rule="!has(self.runtime) || !has(self.writableRoot) || !self.writableRoot",message="writableRoot belongs to an image; in a runtime /tmp can be written to"
// +kubebuilder:validation:XValidation:rule="!has(self.group) || !has(self.port)",message="port cannot be chosen in a pod that a group shares; leave it out, and have the process listen on $PORT"
type FunctionSpec struct {
	// Image that has the process to run. It is resolved to a digest once for each Revision, so that all Instances run the same bytes.
	// Exactly one of image and runtime is needed.
	// +optional
	// +kubebuilder:validation:XValidation:rule="self.matches('^[!-~]+$')",message="must be an image reference, without blanks; for example registry.example/hello:1"
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=1024
	Image string `json:"image,omitempty"`
	// Runtime by name, in which code runs. It is booted before any request comes. Needs code.
	// +optional
	// +kubebuilder:validation:MinLength=1
	Runtime Name `json:"runtime,omitempty"`
	// Code that runs in the runtime.
	// +optional
	Code *Code `json:"code,omitempty"`
	// Port where the process listens, which it also finds in $PORT. 8080 if it is left out; in a group it has to be.
	// +optional
	// +kubebuilder:validation:Minimum=1
	// +kubebuilder:validation:Maximum=65535
	Port int32 `json:"port,omitempty"`
	// Env is the process's environment. Whoever may read the Function can read it: what is secret belongs into secrets.
	// +optional
	// +listType=map
	// +listMapKey=name
	// +kubebuilder:validation:MaxItems=1000
	Env []EnvVar `json:"env,omitempty"`
	// Command replaces the image's entrypoint.
	// +optional
	// +listType=atomic
	// +kubebuilder:validation:MaxItems=1000
	Command []Word `json:"command,omitempty"`
	// Args replace the image's command.
	// +optional
	// +listType=atomic
	// +kubebuilder:validation:MaxItems=1000
	Args []Word `json:"args,omitempty"`
	// Scaling bounds and shapes the number of Instances.
	// +optional
	// +kubebuilder:default={}
	Scaling Scaling `json:"scaling,omitzero"`
	// Hosts are further host names under which the gateway serves the Function, besides its URL.
	// +optional
	// +listType=set
	// +kubebuilder:validation:MaxItems=100
	Hosts []Host `json:"hosts,omitempty"`
	// Timeout is the longest that a request may take from its arrival at the gateway to the first byte of its answer. At most 1h.
	// +optional
	// +kubebuilder:default="60s"
	// +kubebuilder:validation:Type=string
	// +kubebuilder:validation:MaxLength=24
	// +kubebuilder:validation:XValidation:rule="self.matches('^([0-9]{1,9}([.][0-9]{1,6})?(ns|us|ms|s|m|h))+$') && duration(self) <= duration('1h')",message="must be a duration from 0s to 1h; for example 60s"
	Timeout *metav1.Duration `json:"timeout,omitempty"`
	// Resources that an Instance may use.
	// +optional
	Resources Resources `json:"resources,omitzero"`
	// Secrets are files that the process finds in /run/secrets, in memory only, each with one value of a Secret of this namespace. A
	// changed value makes a new Revision.
	// +optional
	// +listType=map
	// +listMapKey=name
	// +kubebuilder:validation:MaxItems=1000
	Secrets []SecretFile `json:"secrets,omitempty"`
	// Tenant whose Function this is; nobody else's Functions get into its pods. Empty is the cluster's owner.
	// +optional
	// +kubebuilder:validation:MinLength=1
	Tenant Name `json:"tenant,omitempty"`
	// Group: the Functions of one tenant and one group share pods, a process each. Empty shares with nobody.
	// +optional
	// +kubebuilder:validation:MinLength=1
	Group Name `json:"group,omitempty"`
	// WritableRoot lets the image's process write to its root file system, in memory, up to half of the Instance's limit. It is read-only
	// otherwise; /tmp can always be written to.
	// +optional
	WritableRoot bool `json:"writableRoot,omitempty"`
}

// Name is a DNS label of at most 40 bytes, or empty.
//
// +kubebuilder:validation:MaxLength=63
// +kubebuilder:validation:XValidation:rule="self.matches('^[a-z0-9]([-a-z0-9]{0,38}[a-z0-9])?$')",message="must be a DNS label (a-z, 0-9 and -) of at most 40 bytes; for example hello-2"
type Name = string

// Word of a command line.
//
// +kubebuilder:validation:MaxLength=131071
// +kubebuilder:validation:Pattern=`^[^\x00]*$`
type Word string

// Host name that the gateway routes.
//
// +kubebuilder:validation:MaxLength=253
// +kubebuilder:validation:XValidation:rule="self.matches('^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?([.][a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?)*$')",message="must be a host name in lower case and without a port; for example www.example.org"
type Host string

// Code is what runs in a Runtime.
type Code struct {
	// Package is an OCI image, by digest, whose layers are the code, as `hearth deploy` pushes it. It is found at /workspace, read-only.
	// +required
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=1024
	// +kubebuilder:validation:XValidation:rule="self.matches('^[!-~]+@sha256:[0-9a-f]{64}$')",message="must be an image reference by digest, for a tag may come to mean other code; for example registry.example/code/hello@sha256:…"
	Package string `json:"package"`
	// Handler in the language's own terms: MODULE.FUNCTION in Python and Node, a class in Java, the path of a program in native.
	// +optional
	// +kubebuilder:validation:MaxLength=1024
	// +kubebuilder:validation:XValidation:rule="self.matches('^\\\\PC*$')",message="must be printable; for example main.hello"
	Handler string `json:"handler,omitempty"`
	// Signature is how the code wants to be called: http or cloudevent, as the Functions Framework has them.
	// +optional
	// +kubebuilder:default=http
	Signature Signature `json:"signature,omitempty"`
}

// Signature is a contract between a Runtime's loader and code.
//
// +kubebuilder:validation:Enum=http;cloudevent
type Signature string

// The signatures that there are.
const (
	SignatureHTTP       Signature = "http"
	SignatureCloudEvent Signature = "cloudevent"
)

// EnvVar is one variable of a process's environment.
type EnvVar struct {
	// Name of the variable.
	// +required
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=1024
	// +kubebuilder:validation:XValidation:rule="!self.contains('=') && !self.contains('\\u0000')",message="must be a variable's name, without = and zero bytes; for example LEVEL"
	Name string `json:"name"`
	// Value of the variable.
	// +optional
	// +kubebuilder:validation:MaxLength=131071
	// +kubebuilder:validation:Pattern=`^[^\x00]*$`
	Value string `json:"value,omitempty"`
}

// SecretFile is a file with one value of a Secret.
type SecretFile struct {
	// Name of the file in /run/secrets.
	// +required
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=253
	// +kubebuilder:validation:XValidation:rule="self.matches('^[a-zA-Z0-9._-]+$') && self != '.' && self != '..'",message="must be a file name of letters, digits, '.', '_' and '-'; for example api-key"
	Name string `json:"name"`
	// SecretKeyRef says which value of which Secret of this namespace it has.
	// +required
	SecretKeyRef SecretKeyRef `json:"secretKeyRef"`
}

// SecretKeyRef names a value of a Secret of the same namespace.
type SecretKeyRef struct {
	// Name of the Secret.
	// +required
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=253
	Name string `json:"name"`
	// Key in the Secret's data.
	// +required
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=253
	Key string `json:"key"`
}

// Scaling bounds and shapes the number of Instances of a Function.
//
// +kubebuilder:validation:XValidation:rule="!has(self.min) || !has(self.max) || self.min <= self.max",message="min is more than max, which is 10 if it is left out; for example min: 1, max: 10"
type Scaling struct {
	// Concurrency is how many requests one Instance serves at once, a hard limit. A change makes a new Revision.
	// +optional
	// +kubebuilder:default=10
	// +kubebuilder:validation:Minimum=1
	// +kubebuilder:validation:Maximum=100000
	Concurrency int32 `json:"concurrency,omitempty"`
	// Min Instances are kept ready at all times.
	// +optional
	// +kubebuilder:default=0
	// +kubebuilder:validation:Minimum=0
	// +kubebuilder:validation:Maximum=10000
	Min int32 `json:"min,omitempty"`
	// Max Instances ever.
	// +optional
	// +kubebuilder:default=10
	// +kubebuilder:validation:Minimum=1
	// +kubebuilder:validation:Maximum=10000
	Max int32 `json:"max,omitempty"`
	// Window over which concurrency is averaged. At most 1h.
	// +optional
	// +kubebuilder:default="60s"
	// +kubebuilder:validation:Type=string
	// +kubebuilder:validation:MaxLength=24
	// +kubebuilder:validation:XValidation:rule="self.matches('^([0-9]{1,9}([.][0-9]{1,6})?(ns|us|ms|s|m|h))+$') && duration(self) <= duration('1h')",message="must be a duration from 0s to 1h; for example 60s"
	Window *metav1.Duration `json:"window,omitempty"`
	// Grace is how long the last Instance stays after the window has fallen silent. At most 1h.
	// +optional
	// +kubebuilder:default="30s"
	// +kubebuilder:validation:Type=string
	// +kubebuilder:validation:MaxLength=24
	// +kubebuilder:validation:XValidation:rule="self.matches('^([0-9]{1,9}([.][0-9]{1,6})?(ns|us|ms|s|m|h))+$') && duration(self) <= duration('1h')",message="must be a duration from 0s to 1h; for example 60s"
	Grace *metav1.Duration `json:"grace,omitempty"`
	// Queue is how many requests may wait in one gateway for an Instance.
	// +optional
	// +kubebuilder:default=1000
	// +kubebuilder:validation:Minimum=1
	// +kubebuilder:validation:Maximum=1000000
	Queue int32 `json:"queue,omitempty"`
	// Frozen is how many Instances that are not needed are kept frozen, to be thawed before any other is taken; 0 is none.
	// +optional
	// +kubebuilder:default=1
	// +kubebuilder:validation:Minimum=0
	// +kubebuilder:validation:Maximum=10000
	Frozen *int32 `json:"frozen,omitempty"`
}

// Resources of an Instance. What is left out is the node's limit for memory, and none for the processor.
type Resources struct {
	// CPU that it may use, in processors; for example 500m.
	// +optional
	// +kubebuilder:validation:XValidation:rule="quantity(string(self)).isGreaterThan(quantity('0')) && quantity(string(self)).compareTo(quantity('1M')) < 0",message="must be more than 0, in processors; for example 500m"
	CPU *resource.Quantity `json:"cpu,omitempty"`
	// Memory that it may use, in bytes; for example 128Mi.
	// +optional
	// +kubebuilder:validation:XValidation:rule="quantity(string(self)).compareTo(quantity('1')) >= 0 && quantity(string(self)).compareTo(quantity('1P')) < 0",message="must be at least a byte; for example 128Mi"
	Memory *resource.Quantity `json:"memory,omitempty"`
}

// FunctionStatus is what Hearth says of a Function.
type FunctionStatus struct {
	// Conditions: Accepted (this spec is taken over, or what is wrong with it) and Ready (requests are served, from zero too).
	// +optional
	// +listType=map
	// +listMapKey=type
	Conditions []metav1.Condition `json:"conditions,omitempty"`
	// ObservedGeneration of the spec that this status is about.
	// +optional
	ObservedGeneration int64 `json:"observedGeneration,omitempty"`
	// LatestRevision is the one that serves.
	// +optional
	LatestRevision string `json:"latestRevision,omitempty"`
	// Ready Instances: they serve now.
	// +optional
	Ready int32 `json:"ready"`
	// Starting Instances.
	// +optional
	Starting int32 `json:"starting"`
	// Desired Instances, as the scaler decided last.
	// +optional
	Desired int32 `json:"desired"`
	// Reason is the scaler's own sentence for the desired number.
	// +optional
	Reason string `json:"reason,omitempty"`
	// URL where the gateway serves it.
	// +optional
	URL string `json:"url,omitempty"`
}

// FunctionList is what the API server answers to a list.
//
// +kubebuilder:object:root=true
type FunctionList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitempty"`
	Items           []Function `json:"items"`
}
