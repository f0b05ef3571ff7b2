// A neuron in a frame of another page: read only.

import "./look.js";
import { makeTabs } from "./tabs.js";

makeTabs(document);
